"""How the model knows positions. A new kind is one class here, registered under its recipe name.

A kind acts in up to three places: on the embedded tokens, once (`forward`); on queries and keys (`rotation`); on the
scores of a layer (`score_bias`, a module of each layer).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.model import ModelSection
from megalm.distributed.collectives import sum_gradient
from megalm.distributed.places import Places, select
from megalm.distributed.sharding import ShardSpec
from megalm.nn.context import Rotation, unturned
from megalm.nn.ops import select_operations
from megalm.nn.rotary import rotary_tables
from megalm.registry import Registry
from megalm.tensor_parallel.initialize import Initializer

POSITIONS: Registry[type[Position]] = Registry("position")


class ScoreBias(nn.Module):
    """What a layer adds to its scores for positions; the heads are split over the tensor axis."""

    def forward(self, queries: Places, tokens: int) -> dict[str, Tensor]:
        """Return arguments of `Operations.flash_attention` for some queries of rows of `tokens` tokens."""
        raise AssertionError(f"{type(self).__name__} has no forward pass")


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

    def forward(self, x_BTD: Tensor, places: Places) -> Tensor:
        """Return the embedded tokens, whose positions are `places`, with what belongs to them."""
        return x_BTD

    def rotation(self, places: Places) -> Rotation:
        """Return what is applied to queries and keys of positions `places`, shape BTHE."""
        return unturned

    @staticmethod
    def score_bias(name: str, config: ModelSection, group: dist.ProcessGroup, init: Initializer) -> ScoreBias | None:
        """Return what the layer's attention called `name` adds to its scores, if anything; `group` is the tensor's."""
        return None


POSITIONS.register("none")(Position)


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
            self.weight = init.table(spec, config.init_std)

    def forward(self, x_BTD: Tensor, places: Places) -> Tensor:
        """Add the vectors of these positions."""
        weight = self.weight if self.group is None else sum_gradient(self.weight, self.group)
        return x_BTD + select(weight, places, dim=0)


@POSITIONS.register("sinusoidal")
class SinusoidalPosition(Position):
    """Sines and cosines of falling frequency, side by side, added to the embedded tokens (Vaswani et al. 2017)."""

    table_TD: Tensor | None

    def __init__(
        self, config: ModelSection, *, embeds: bool, group: dist.ProcessGroup | None, init: Initializer
    ) -> None:
        super().__init__(config, embeds=embeds, group=group, init=init)
        self.table_TD = None
        if embeds:
            places_T = torch.arange(config.sequence, dtype=torch.float64)
            pairs = torch.arange(0, config.hidden, 2, dtype=torch.float64)
            angles = places_T[:, None] * 10000.0 ** (-pairs / config.hidden)
            table_TD = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, : config.hidden]
            self.table_TD = table_TD.to(init.device, init.dtype)

    def forward(self, x_BTD: Tensor, places: Places) -> Tensor:
        """Add the vectors of these positions."""
        assert self.table_TD is not None, "this stage embeds no tokens"
        return x_BTD + select(self.table_TD, places, dim=0)


@POSITIONS.register("rotary")
class RotaryPosition(Position):
    """Rotary positions (Su et al. 2021): pairs (j, j + R/2) of a head's first R features turn, see `rotary`."""

    cos_TR: Tensor
    sin_TR: Tensor

    def __init__(
        self, config: ModelSection, *, embeds: bool, group: dist.ProcessGroup | None, init: Initializer
    ) -> None:
        super().__init__(config, embeds=embeds, group=group, init=init)
        table_dtype = torch.promote_types(init.dtype, torch.float32)
        self.operations = select_operations(config.kernels, init.device)
        self.cos_TR, self.sin_TR = (table.to(init.device, table_dtype) for table in rotary_tables(config))

    def rotation(self, places: Places) -> Rotation:
        """Return the rotation of these positions."""
        cos_TR, sin_TR = select(self.cos_TR, places, dim=0), select(self.sin_TR, places, dim=0)
        return lambda x_BTHE: self.operations.apply_rotary(x_BTHE, cos_TR, sin_TR)


@POSITIONS.register("alibi")
class AlibiPosition(Position):
    """Scores fall with the distance, by a slope of each head (Press et al. 2022)."""

    @staticmethod
    def score_bias(name: str, config: ModelSection, group: dist.ProcessGroup, init: Initializer) -> ScoreBias:
        """Return the slopes of this rank's heads."""
        return _Slopes(config.heads, group, init)


class _Slopes(ScoreBias):
    def __init__(self, heads: int, group: dist.ProcessGroup, init: Initializer) -> None:
        super().__init__()
        index, count = group.rank(), group.size()
        own = alibi_slopes(heads)[index * heads // count : (index + 1) * heads // count]
        self.slopes_H = torch.tensor(own, dtype=torch.promote_types(init.dtype, torch.float32), device=init.device)

    def forward(self, queries: Places, tokens: int) -> dict[str, Tensor]:
        """Return `slopes_H`."""
        return {"slopes_H": self.slopes_H}


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each head: 2^(-8/n), its square, its cube ... for n heads where n is a power of two.

    Else those of the power of two below, and then every other one of the power of two above, as the authors' code has.
    """
    below = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    return slopes + [2.0 ** (-4.0 * (2 * head + 1) / below) for head in range(heads - below)]


@POSITIONS.register("t5")
class RelativePosition(Position):
    """Scores get a learned term for each head and bucket of distances, a table in each layer (Raffel et al. 2020).

    T5 has one table for all layers; here each has its own, which no pipeline stage shares with another.
    """

    @staticmethod
    def score_bias(name: str, config: ModelSection, group: dist.ProcessGroup, init: Initializer) -> ScoreBias:
        """Return the table of this rank's heads."""
        return _RelativeBias(f"{name}.relative", config, group, init)


class _RelativeBias(ScoreBias):
    def __init__(self, name: str, config: ModelSection, group: dist.ProcessGroup, init: Initializer) -> None:
        super().__init__()
        index, count = group.rank(), group.size()
        shape = (config.heads, config.relative_buckets)
        self.weight = init.table(ShardSpec.split(f"{name}.weight", shape, 0, index, count), config.init_std)
        self.farthest = config.relative_distance

    def forward(self, queries: Places, tokens: int) -> dict[str, Tensor]:
        """Return `bias_HTS`."""
        places_S = torch.arange(tokens, device=self.weight.device)
        distance_TS = (select(places_S, queries, dim=0)[:, None] - places_S).clamp_min(0)  # later keys are hidden
        return {"bias_HTS": self.weight[:, relative_bucket(distance_TS, self.weight.shape[1], self.farthest)]}


def relative_bucket(distance: Tensor, buckets: int, farthest: int) -> Tensor:
    """Return the bucket, int64, of each distance >= 0: one each for the lower half, then ever wider ones.

    The last bucket holds all distances from about `farthest` on.
    """
    exact = buckets // 2
    ratio = (distance.clamp_min(1).double() / exact).log() / math.log(farthest / exact)
    wide = exact + (ratio * (buckets - exact)).long()
    return torch.where(distance < exact, distance, wide.clamp_max(buckets - 1))
