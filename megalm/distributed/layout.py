"""Where a rank stands on the mesh of pipeline x data x tensor: arithmetic only, no torch.

`mesh.py` makes process groups of it; recipes are checked against it before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megalm.errors import ConfigError

Axis = Literal["pipeline", "data", "tensor", "model", "embedding"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Coordinates:
    """A rank's index along each axis, from 0."""

    pipeline: int
    data: int
    tensor: int

    def __str__(self) -> str:
        return f"pipeline {self.pipeline}, data {self.data}, tensor {self.tensor}"


@dataclass(frozen=True)
class RankLayout:
    """The size of each axis. Ranks run tensor fastest, then data, pipeline slowest.

    Tensor-parallel ranks talk most and so are neighbours on one node; pipeline stages talk least.
    Raises ConfigError for a size below 1.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "data", "tensor"):
            size = getattr(self, name)
            if size < 1:
                raise ConfigError(f"parallel.{name}={size} is not a size of an axis; use 1 or more")

    @classmethod
    def fill(cls, world_size: int, pipeline: int, tensor: int) -> RankLayout:
        """Return the layout whose data axis takes what remains of `world_size`; ConfigError if nothing fits."""
        if world_size < 1 or world_size % (pipeline * tensor):
            raise ConfigError(
                f"{world_size} processes do not divide into parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
                f"start a multiple of {pipeline * tensor}"
            )
        return cls(pipeline, world_size // (pipeline * tensor), tensor)

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.pipeline * self.data * self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        """Return where `rank` stands."""
        assert 0 <= rank < self.world_size, f"rank {rank} in a world of {self.world_size}"
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, tensor)

    def rank(self, pipeline: int = 0, data: int = 0, tensor: int = 0) -> int:
        """Return the global rank that stands at these indices."""
        assert 0 <= pipeline < self.pipeline and 0 <= data < self.data and 0 <= tensor < self.tensor, (
            f"({pipeline}, {data}, {tensor}) outside of {self}"
        )
        return (pipeline * self.data + data) * self.tensor + tensor

    def group_of(self, axis: Axis, rank: int) -> list[int] | None:
        """Return the ascending ranks of the group along `axis` that `rank` belongs to.

        "model": pipeline x tensor at one data index. "embedding": the first and the last stage at one data and
        tensor index ([rank] when there is one stage); None for the ranks of the stages between them.
        """
        at = self.coordinates(rank)
        if axis == "tensor":
            return [self.rank(at.pipeline, at.data, tensor) for tensor in range(self.tensor)]
        if axis == "data":
            return [self.rank(at.pipeline, data, at.tensor) for data in range(self.data)]
        if axis == "pipeline":
            return [self.rank(stage, at.data, at.tensor) for stage in range(self.pipeline)]
        if axis == "model":
            stages, tensors = range(self.pipeline), range(self.tensor)
            return [self.rank(stage, at.data, tensor) for stage in stages for tensor in tensors]
        assert axis == "embedding", f"axis {axis!r}, known: {AXES}"
        ends = sorted({0, self.pipeline - 1})
        return [self.rank(stage, at.data, at.tensor) for stage in ends] if at.pipeline in ends else None

    def groups(self, axis: Axis) -> list[list[int]]:
        """Return all groups along `axis`, ordered by their first rank."""
        found = (self.group_of(axis, rank) for rank in range(self.world_size))
        return [ranks for rank, ranks in enumerate(found) if ranks is not None and ranks[0] == rank]
