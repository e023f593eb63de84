"""How the model knows positions. A new kind is one class here, registered under its recipe name.

A position module acts in two places: its forward pass on the embedded tokens, once, and its rotation on queries
and keys, in every block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.run import ModelSection
from megalm.distributed.collectives import sum_gradient
from megalm.distributed.sharding import ShardSpec
from megalm.nn.ops import select_operations
from megalm.registry import Registry
from megalm.tensor_parallel.initialize import Initializer

POSITIONS: Registry[type[Position]] = Registry("position")

Rotation = Callable[[Tensor], Tensor]


class Position(nn.Module):
    """No position at all; the kinds override what they need.

    `group` is the tensor group under sequence parallelism, otherwise None.
    """

    def __init__(
        self, config: ModelSection, *, embeds: bool, group: dist.ProcessGroup | None, init: Initializer
    ) -> None:
        super().__init__()
        del config, embeds, init
        self.group = group

    def forward(self, x_BTD: Tensor, first_token: int) -> Tensor:
        """Return the embedded tokens with what belongs to them; the first has position `first_token`."""
        return x_BTD

    def rotation(self, tokens: int) -> Rotation:
        """Return what is applied to queries and keys of positions 0 ... tokens - 1, shape BTHE."""
        return lambda x_BTHE: x_BTHE


@POSITIONS.register("learned")
class LearnedPosition(Position):
    """One learned vector a position, added to the embedded tokens (GPT-2).

    Only the stage that embeds tokens holds the weight.
    """

    def __init__(
        self, config: ModelSection, *, embeds: bool, group: dist.ProcessGroup | None, init: Initializer
    ) -> None:
        super().__init__(config, embeds=embeds, group=group, init=init)
        if embeds:
            spec = ShardSpec.whole("position.weight", (config.sequence, config.hidden))
            self.weight = init.normal(spec, config.init_std)

    def forward(self, x_BTD: Tensor, first_token: int) -> Tensor:
        """Add the vectors of positions first_token ... first_token + T - 1."""
        weight = self.weight if self.group is None else sum_gradient(self.weight, self.group)
        return x_BTD + weight[first_token : first_token + x_BTD.shape[1]]


@POSITIONS.register("rotary")
class RotaryPosition(Position):
    """Rotary positions (Su et al. 2021): pairs (j, j + E/2) turn by position * base^(-2j/E)."""

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(
        self, config: ModelSection, *, embeds: bool, group: dist.ProcessGroup | None, init: Initializer
    ) -> None:
        super().__init__(config, embeds=embeds, group=group, init=init)
        pairs = torch.arange(0, config.head_size, 2, dtype=torch.float64)
        frequencies = config.rotary_base ** (-pairs / config.head_size)
        angles = torch.arange(config.sequence, dtype=torch.float64)[:, None] * frequencies
        angles_TE = torch.cat((angles, angles), dim=-1)
        table_dtype = torch.promote_types(init.dtype, torch.float32)
        self.operations = select_operations(config.kernels, init.device)
        self.cos_TE = angles_TE.cos().to(init.device, table_dtype)
        self.sin_TE = angles_TE.sin().to(init.device, table_dtype)

    def rotation(self, tokens: int) -> Rotation:
        """Return the rotation of positions 0 ... tokens - 1."""
        cos_TE, sin_TE = self.cos_TE[:tokens], self.sin_TE[:tokens]
        return lambda x_BTHE: self.operations.apply_rotary(x_BTHE, cos_TE, sin_TE)
