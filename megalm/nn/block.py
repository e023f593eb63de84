"""One Transformer block: attention and MLP, each added to the residual stream, with norms where the recipe wants them.

pre        x + attention(norm(x)), then x + mlp(norm(x))                       (Radford et al. 2019)
post       norm(x + attention(x)), then norm(x + mlp(x))                       (Vaswani et al. 2017)
sandwich   x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))           (Ding et al. 2021, Gemma 2)
parallel   x + attention(norm(x)) + mlp(norm(x)), with norms as in pre or sandwich   (Wang and Komatsuzaki 2021)
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.nn.attention import Attention
from megalm.nn.context import Context
from megalm.nn.dropout import Dropout, StochasticDepth
from megalm.nn.mlp import MLP
from megalm.nn.moe import MixtureOfExperts
from megalm.nn.norms import build_norm
from megalm.nn.ops import select_operations
from megalm.tensor_parallel.initialize import Initializer


class TransformerBlock(nn.Module):
    """Block number `index` of the whole model: x_BTD -> x_BTD (x_BTtD with `sequence`).

    `group` is the tensor group; the ranks of `expert_group` divide the experts (None: this one has all).
    """

    def __init__(
        self,
        index: int,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
        context: ContextParallel | None = None,
        expert_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        name = f"blocks.{index}"
        self.place, self.parallel = config.norm_place, config.parallel_residual
        self.residual_scale = config.residual_scale
        self.operations = select_operations(config.kernels, init.device)

        def norm(which: str) -> nn.Module:
            token_group = group if sequence else None
            return build_norm(f"{name}.{which}", config, group=token_group, init=init, operations=self.operations)

        left_out = config.stochastic_depth * min(index + 1, config.layers) / config.layers
        self.attention_norm = norm("attention_norm")
        self.attention = Attention(
            f"{name}.attention", index, config, group=group, init=init, sequence=sequence, context=context
        )
        self.attention_dropout = Dropout(f"{name}.attention", config.dropout)
        self.attention_depth = StochasticDepth(f"{name}.attention.depth", left_out)
        self.mlp_norm = norm("mlp_norm")
        self.has_experts = config.has_experts(index)
        if self.has_experts:
            self.mlp: nn.Module = MixtureOfExperts(
                f"{name}.mlp",
                config,
                group=group,
                init=init,
                sequence=sequence,
                expert_group=expert_group,
                context=context,
            )
        else:
            self.mlp = MLP(f"{name}.mlp", config, group=group, init=init, sequence=sequence)
        self.mlp_dropout = Dropout(f"{name}.mlp", config.dropout)
        self.mlp_depth = StochasticDepth(f"{name}.mlp.depth", left_out)
        self.attention_out_norm, self.mlp_out_norm = (
            norm(f"{half}_out_norm") if self.place == "sandwich" else None for half in ("attention", "mlp")
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the residual stream after this block."""
        attention_drop = self.attention_dropout.on(context.dropout, context.held, context.tokens)
        mlp_drop = self.mlp_dropout.on(context.dropout, context.held, context.tokens)
        if self.place == "post":
            x, _ = self.attention_norm(self._attended(x, context), residual=x, drop=attention_drop)
            x, _ = self.mlp_norm(self._transformed(x, context), residual=x, drop=mlp_drop)
            return x
        attended = self._attended(self.attention_norm(x), context)
        if self.parallel:
            normed = self.mlp_norm(x)
            x = self.operations.dropout(attended, drop=attention_drop, residual=x)
        else:
            normed, x = self.mlp_norm(attended, residual=x, drop=attention_drop)
        return self.operations.dropout(self._transformed(normed, context), drop=mlp_drop, residual=x)

    def _attended(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention(x, context)
        return self._to_be_added(y, self.attention_out_norm, self.attention_depth, context)

    def _transformed(self, x: Tensor, context: Context) -> Tensor:
        y = self.mlp(x, context) if self.has_experts else self.mlp(x)
        return self._to_be_added(y, self.mlp_out_norm, self.mlp_depth, context)

    def _to_be_added(self, y: Tensor, norm: nn.Module | None, depth: StochasticDepth, context: Context) -> Tensor:
        y = y if norm is None else norm(y)
        return depth(y if self.residual_scale == 1.0 else y * self.residual_scale, context.dropout)
