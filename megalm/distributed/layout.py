"""Where a rank stands on the mesh of pipeline x data x context x tensor: arithmetic only, no torch.

`mesh.py` makes process groups of it; recipes are checked against it before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megalm.errors import ConfigError

Axis = Literal["pipeline", "data", "context", "tensor", "replica", "expert", "expert_replica", "model", "embedding"]
"""The axes of the mesh, and groups made of them: see `RankLayout.group_of`."""
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Coordinates:
    """A rank's index along each axis, from 0."""

    pipeline: int
    data: int
    tensor: int
    context: int = 0

    def __str__(self) -> str:
        return f"pipeline {self.pipeline}, data {self.data}, context {self.context}, tensor {self.tensor}"


@dataclass(frozen=True)
class RankLayout:
    """The size of each axis. Ranks run tensor fastest, then context, then data, pipeline slowest.

    Tensor-parallel ranks talk most and so are neighbours on one node; pipeline stages talk least. `expert` is no axis
    of its own: so many neighbours among the replicas of a stage, data x context, divide the experts between them.
    Raises ConfigError for a size below 1, or where `expert` does not divide the replicas.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "data", "tensor", "context", "expert"):
            size = getattr(self, name)
            if size < 1:
                raise ConfigError(f"parallel.{name}={size} is not a size of an axis; use 1 or more")
        if self.replicas % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide the {self.replicas} ranks that hold the same layers "
                f"(data {self.data} x context {self.context}); use a divisor of {self.replicas}"
            )

    @property
    def replicas(self) -> int:
        """Return the number of ranks that hold the same weights, but for experts: data x context."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.pipeline * self.replicas * self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        """Return where `rank` stands."""
        assert 0 <= rank < self.world_size, f"rank {rank} in a world of {self.world_size}"
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, tensor, context)

    def rank(self, pipeline: int = 0, data: int = 0, tensor: int = 0, context: int = 0) -> int:
        """Return the global rank that stands at these indices."""
        assert (
            0 <= pipeline < self.pipeline
            and 0 <= data < self.data
            and 0 <= tensor < self.tensor
            and 0 <= context < self.context
        ), f"({pipeline}, {data}, {tensor}, {context}) outside of {self}"
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def group_of(self, axis: Axis, rank: int) -> list[int] | None:
        """Return the ascending ranks of the group along `axis` that `rank` belongs to.

        "replica": data x context, the ranks that hold the same weights. "expert": those of them that divide the experts
        between them; "expert_replica": those that hold the same experts. "model": pipeline x tensor at one data and
        context index. "embedding": the first and the last stage at one data, context and tensor index ([rank] when
        there is one stage); None for the ranks of the stages between them.
        """
        at = self.coordinates(rank)
        own = {"pipeline": at.pipeline, "data": at.data, "tensor": at.tensor, "context": at.context}
        if axis in ("tensor", "data", "context", "pipeline"):
            return [self.rank(**{**own, axis: index}) for index in range(getattr(self, axis))]
        if axis in ("replica", "expert", "expert_replica"):
            first, step = self.rank(at.pipeline, tensor=at.tensor), self.tensor
            replicas = range(first, first + self.replicas * step, step)
            block, index = divmod(at.data * self.context + at.context, self.expert)
            chosen = {
                "replica": replicas,
                "expert": replicas[block * self.expert : (block + 1) * self.expert],
                "expert_replica": replicas[index :: self.expert],
            }
            return list(chosen[axis])
        if axis == "model":
            stages, tensors = range(self.pipeline), range(self.tensor)
            return [self.rank(stage, at.data, tensor, at.context) for stage in stages for tensor in tensors]
        assert axis == "embedding", f"axis {axis!r}, known: {AXES}"
        ends = sorted({0, self.pipeline - 1})
        return [self.rank(**{**own, "pipeline": stage}) for stage in ends] if at.pipeline in ends else None

    def groups(self, axis: Axis) -> list[list[int]]:
        """Return all groups along `axis`, ordered by their first rank."""
        found = (self.group_of(axis, rank) for rank in range(self.world_size))
        return [ranks for rank, ranks in enumerate(found) if ranks is not None and ranks[0] == rank]
