"""Which elements of which parameters an optimizer's tensors are, for optimizers that must know.

Most treat every number alike and need not: they work on whole tensors as on flat partitions of ZeRO. Those here are
told where their tensors lie in the model, and may keep state that has other shapes than the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.zero.saving import part_of


@dataclass(frozen=True)
class Part:
    """Elements [start, start + length) of a parameter's flattened local tensor, at `offset` of an optimizer's tensor.

    None of them (length 0): other data ranks have them all. `counted`: this rank saves what belongs to the parameter.
    `tied`: another stage has the parameter too, and must update it alike.
    """

    shard: ShardSpec
    offset: int
    start: int
    length: int
    counted: bool
    tied: bool = False


class PlacedOptimizer(torch.optim.Optimizer):
    """An optimizer that is told which parameters its tensors are, by `place`, before its first step."""

    state_dtype: torch.dtype | None = None
    """The dtype of its state of one element for each element; None: that of the tensors."""

    own_kinds: frozenset[str] = frozenset()
    """The states that it keeps by parameter, alike on all data ranks, and gives as `own_states`."""

    parts: Mapping[Tensor, Sequence[Part]]
    mesh: ParallelMesh
    divided: bool
    """Whether the data ranks have a part each of the parameters, as under ZeRO."""

    def place(self, parts: Mapping[Tensor, Sequence[Part]], mesh: ParallelMesh, divided: bool) -> None:
        """Say what each tensor of the groups holds; the data ranks give the same parameters in the same order."""
        self.parts, self.mesh, self.divided = parts, mesh, divided

    def kinds_of(self, group: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
        """Return those of a checkpoint's kinds of state that the tensors of a group have."""
        return list(kinds)

    def own_states(self) -> Iterator[tuple[Part, ShardSpec, str, Tensor]]:
        """Yield the states kept by parameter: its part, the state's own place in the whole, kind, and local values."""
        yield from ()


def place(
    optimizer: torch.optim.Optimizer, parts: Mapping[Tensor, Sequence[Part]], mesh: ParallelMesh, divided: bool
) -> None:
    """Tell an optimizer that must know where its tensors lie."""
    if isinstance(optimizer, PlacedOptimizer):
        optimizer.place(parts, mesh, divided)


def own_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Part, ShardSpec, str, Tensor]]:
    """Yield what an optimizer keeps by parameter."""
    if isinstance(optimizer, PlacedOptimizer):
        yield from optimizer.own_states()


def own_fragments(optimizer: torch.optim.Optimizer, mesh: ParallelMesh) -> Iterator[Fragment]:
    """Yield this rank's share of the states kept by parameter, which exist on all data ranks."""
    index, count = mesh.index("replica"), mesh.size("replica")
    for part, shard, kind, values in own_states(optimizer):
        once = shard.dim is not None or mesh.coordinates.tensor == 0
        start, stop = part_of(shard.name, values.numel(), values.element_size(), index, count)
        if part.counted and once and start < stop:
            yield Fragment(shard, kind, start, values.flatten()[start:stop])


def elementwise(optimizer: torch.optim.Optimizer, kinds: Sequence[str]) -> list[str]:
    """Return those of a checkpoint's kinds of state that have an element for each element of the tensors."""
    own = optimizer.own_kinds if isinstance(optimizer, PlacedOptimizer) else frozenset()
    return [kind for kind in kinds if kind not in own]
