"""Causal self-attention with grouped queries, its heads split over the tensor axis."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.run import ModelSection
from megalm.nn.dropout import Dropout, DropoutKeys
from megalm.nn.ops import select_operations
from megalm.nn.positions import Rotation
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention: x_BTD -> y_BTD (x_BTtD -> y_BTtD with `sequence`).

    The rows of the fused projection are grouped by key/value head: the queries of its group, its key, its value.
    So a split of the groups over the tensor axis is a contiguous split of the weight's rows.
    """

    def __init__(
        self,
        name: str,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
    ) -> None:
        super().__init__()
        size = dist.get_world_size(group)
        self.head_size = config.head_size
        self.queries_a_group = config.heads // config.key_value_heads
        self.groups = config.key_value_heads // size
        self.heads = config.heads // size
        self.first_head = dist.get_rank(group) * self.heads
        self.all_heads = config.heads
        width = config.heads * config.head_size
        projected = width + 2 * config.key_value_heads * config.head_size
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv",
            config.hidden,
            projected,
            group=group,
            init=init,
            std=config.init_std,
            bias=config.bias,
            sequence=sequence,
        )
        self.out = RowParallelLinear(
            f"{name}.out",
            width,
            config.hidden,
            group=group,
            init=init,
            std=config.init_std / math.sqrt(2 * config.layers),
            bias=config.bias,
            sequence=sequence,
        )
        self.dropout = Dropout(f"{name}.probabilities", config.dropout)
        operations = select_operations(config.kernels, init.device)
        self.attend = operations.flash_attention if config.flash_attention else operations.unfused_attention

    def forward(self, x: Tensor, rotate: Rotation, keys: DropoutKeys | None) -> Tensor:
        """Attend over all earlier tokens of the same row."""
        projected = self.qkv(x)
        rows, tokens, _ = projected.shape
        grouped = projected.view(rows, tokens, self.groups, self.queries_a_group + 2, self.head_size)
        parts = grouped.split((self.queries_a_group, 1, 1), dim=3)  # one backward for all three, unlike slices
        q_BTHE, k_BTGE, v_BTGE = (part.flatten(2, 3) for part in parts)
        drop = self.dropout.at(keys, self.first_head, self.all_heads)
        attended_BTHE = self.attend(rotate(q_BTHE), rotate(k_BTGE), v_BTGE, causal=True, drop=drop)
        return self.out(attended_BTHE.flatten(2))
