"""Weights that are not trained: they have neither gradients nor optimizer state, but belong to every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment
from megalm.zero.engine import ReadFragment, counted_here, replicas_of, shard_of
from megalm.zero.saving import saved_by_stage, saved_range


class FrozenWeights:
    """The frozen ones among a stage's parameters, which ZeRO 3 has divided over the data axis like the others."""

    def __init__(self, parameters: Sequence[Tensor], mesh: ParallelMesh, tied_weight: Tensor | None) -> None:
        self.parameters = [parameter for parameter in parameters if not parameter.requires_grad]
        self.mesh = mesh
        self.tied_weight = tied_weight

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's share of each; together the ranks' are whole."""
        for parameter in self.parameters:
            shard = shard_of(parameter)
            if hasattr(parameter, "ds_tensor"):
                if counted_here(parameter, self.mesh, self.tied_weight):
                    start, values = self._own_part(parameter)
                    yield Fragment(shard, "weight", start, values)
            elif saved_by_stage(parameter, self.mesh, self.tied_weight):
                start, stop = saved_range(parameter, shard, replicas_of(shard), self.mesh)
                if start < stop:
                    yield Fragment(shard, "weight", start, parameter.detach().flatten()[start:stop])

    @torch.no_grad()
    def load(self, read: ReadFragment) -> None:
        """Set what this rank holds of each."""
        for parameter in self.parameters:
            start, values = 0, parameter.view(-1)
            if hasattr(parameter, "ds_tensor"):
                start, values = self._own_part(parameter)
            read(shard_of(parameter), "weight", start, start + values.numel(), values)

    def _own_part(self, parameter: Tensor) -> tuple[int, Tensor]:
        """Return where this rank's part of a divided parameter starts, and its values without padding."""
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = min(self.mesh.index("replica") * part.numel(), whole)
        return start, part.detach().view(-1)[: whole - start]
