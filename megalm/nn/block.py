"""One pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)) (Radford et al. 2019)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.run import ModelSection
from megalm.nn.attention import Attention
from megalm.nn.dropout import Dropout, DropoutKeys
from megalm.nn.mlp import MLP
from megalm.nn.norms import NORMS
from megalm.nn.ops import select_operations
from megalm.nn.positions import Rotation
from megalm.tensor_parallel.initialize import Initializer


class TransformerBlock(nn.Module):
    """Block number `index` of the whole model: x_BTD -> x_BTD (x_BTtD with `sequence`)."""

    def __init__(
        self,
        index: int,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
    ) -> None:
        super().__init__()
        name = f"blocks.{index}"
        make_norm = NORMS.get(config.norm)
        token_group = group if sequence else None
        self.operations = select_operations(config.kernels, init.device)

        def norm(which: str) -> nn.Module:
            return make_norm(
                f"{name}.{which}",
                config.hidden,
                eps=config.norm_eps,
                bias=config.bias,
                group=token_group,
                init=init,
                operations=self.operations,
            )

        self.attention_norm = norm("attention_norm")
        self.attention = Attention(f"{name}.attention", config, group=group, init=init, sequence=sequence)
        self.attention_dropout = Dropout(f"{name}.attention", config.dropout)
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(f"{name}.mlp", config, group=group, init=init, sequence=sequence)
        self.mlp_dropout = Dropout(f"{name}.mlp", config.dropout)

    def forward(self, x: Tensor, rotate: Rotation, keys: DropoutKeys | None, first_token: int, tokens: int) -> Tensor:
        """Return the residual stream after this block.

        x holds tokens `first_token` ... of sequences of `tokens` tokens: all of them, or this rank's part.
        """
        attended = self.attention(self.attention_norm(x), rotate, keys)
        drop = self.attention_dropout.at(keys, first_token, tokens)
        normed, x = self.mlp_norm(attended, residual=x, drop=drop)
        drop = self.mlp_dropout.at(keys, first_token, tokens)
        return self.operations.dropout(self.mlp(normed), drop, residual=x)
