"""One Transformer block: attention and MLP, each added to the residual stream, with norms where the recipe wants them.

pre        x + attention(norm(x)), then x + mlp(norm(x))                       (Radford et al. 2019)
post       norm(x + attention(x)), then norm(x + mlp(x))                       (Vaswani et al. 2017)
sandwich   x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))           (Ding et al. 2021, Gemma 2)
parallel   x + attention(norm(x)) + mlp(norm(x)), with norms as in pre or sandwich   (Wang and Komatsuzaki 2021)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.nn.attention import Attention
from megalm.nn.context import Context
from megalm.nn.dropout import Dropout, StochasticDepth
from megalm.nn.mlp import MLP
from megalm.nn.moe import MixtureOfExperts
from megalm.nn.norms import Norm, build_norm
from megalm.nn.ops import select_operations
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.recomputation import Origin, remember, unchanged


class TransformerBlock(nn.Module):
    """Block number `index` of the whole model: x_BTD -> x_BTD (x_BTtD with `sequence`).

    `group` is the tensor group; the ranks of `expert_group` divide the experts (None: this one has all). With
    `recompute` set the backward pass makes again what is cheap: what norms and activation functions make for linear
    layers, and what is gathered for them. A compiler decides that by itself.
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
        self.recompute = False
        self.operations = select_operations(config.kernels, init.device)

        def norm(which: str) -> Norm:
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
            attended = self._attended(*self._remembered(x), context)
            x, _ = self.attention_norm(attended, residual=x, drop=attention_drop)
            transformed = self._transformed(*self._remembered(x), context)
            x, _ = self.mlp_norm(transformed, residual=x, drop=mlp_drop)
            return x
        attended = self._attended(*self._remembered(self.attention_norm(x), self.attention_norm, x), context)
        if self.parallel:
            mlp_input = self._remembered(self.mlp_norm(x), self.mlp_norm, x)
            x = self.operations.dropout(attended, drop=attention_drop, residual=x)
        else:
            normed, x = self.mlp_norm(attended, residual=x, drop=attention_drop)
            mlp_input = self._remembered(normed, self.mlp_norm, x)
        return self.operations.dropout(self._transformed(*mlp_input, context), drop=mlp_drop, residual=x)

    def _remembered(
        self, x: Tensor, norm: Norm | None = None, normed: Tensor | None = None
    ) -> tuple[Tensor, Origin | None]:
        """Return a half's input x, norm(normed) where there is a norm, and with `recompute` its origin."""
        if not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return x, None
        make = None if norm is None else norm.again()
        if normed is None or make is None:
            return remember(x, x, unchanged)
        return remember(x, normed, make)

    def _attended(self, x: Tensor, origin: Origin | None, context: Context) -> Tensor:
        y = self.attention(x, context, origin)
        return self._to_be_added(y, self.attention_out_norm, self.attention_depth, context)

    def _transformed(self, x: Tensor, origin: Origin | None, context: Context) -> Tensor:
        y = self.mlp(x, context, origin) if self.has_experts else self.mlp(x, origin)
        return self._to_be_added(y, self.mlp_out_norm, self.mlp_depth, context)

    def _to_be_added(self, y: Tensor, norm: nn.Module | None, depth: StochasticDepth, context: Context) -> Tensor:
        y = y if norm is None else norm(y)
        return depth(y if self.residual_scale == 1.0 else y * self.residual_scale, context.dropout)
