"""Who saves what of a tensor that several ranks hold alike: equal parts of one copy, without a word between them."""

from __future__ import annotations

from zlib import crc32

from torch import Tensor

from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec

SHARED_BYTES = 64 << 10
"""Ranks share a tensor in parts no smaller than this: short files and a small index are worth more than balance."""


def part_of(name: str, numel: int, itemsize: int, index: int, count: int) -> tuple[int, int]:
    """Return which elements of the tensor `name` the holder `index` of `count` saves: parts of one size, or none.

    A small tensor goes to some of them, or one, from that on which its name tells: many small ones are spread too.
    """
    parts = max(1, min(count, numel * itemsize // SHARED_BYTES))
    place = (index - crc32(name.encode())) % count
    if place >= parts:
        return 0, 0
    return numel * place // parts, numel * (place + 1) // parts


def saved_range(tensor: Tensor, shard: ShardSpec, axis: Axis, mesh: ParallelMesh) -> tuple[int, int]:
    """Return which elements this rank saves of a tensor of a shape with its shard, which all ranks of an axis hold.

    All tensor ranks hold it too where that axis does not divide it.
    """
    index, count = mesh.index(axis), mesh.size(axis)
    if shard.dim is None:
        index, count = index * mesh.size("tensor") + mesh.index("tensor"), count * mesh.size("tensor")
    return part_of(shard.name, tensor.numel(), tensor.element_size(), index, count)


def saved_by_stage(parameter: Tensor, mesh: ParallelMesh, tied_weight: Tensor | None) -> bool:
    """Return whether this pipeline stage saves the parameter: of tied weights only the first one does."""
    return parameter is not tied_weight or mesh.is_first_stage
