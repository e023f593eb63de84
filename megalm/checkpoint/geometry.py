"""Where a flat piece of one shard lies inside a flat piece of another: the arithmetic of resharding.

Owns: pieces of row-major flattened local tensors as runs of the global tensor, and the overlap of two of
them as a few strided copies. Knows no files and no torch. All counts and offsets are in elements.

Of experts, which dim 0 counts, a rank holds a range of the outer indices besides.

A shard along `dim` sees the tensor as [outer, axis, inner]: for each of the `outer` indices its `length` rows
of `inner` elements are one run, contiguous in the global tensor and in the local one. In both the order of
the runs is the same, so overlaps of two shards, even along different dims, are merges of two sorted lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.distributed.sharding import ShardSpec

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of the row-major flattened local tensor of `shard`."""

    shard: ShardSpec
    start: int
    stop: int

    @property
    def valid_stop(self) -> int:
        """The end of the local elements that are not trailing padding."""
        outer, _, local, length, inner = self._grid()
        return ((outer - 1) * local + length) * inner if outer * length else 0

    def _grid(self) -> tuple[int, int, int, int, int]:
        shard = self.shard
        if shard.dim is None:
            count = prod(shard.global_shape)
            return 1, count, count, count, 1
        shape, dim = shard.global_shape, shard.dim
        return prod(shard.local_shape[:dim]), shape[dim], shard.local_shape[dim], shard.length, prod(shape[dim + 1 :])

    def _offset(self) -> int:
        """Return where the first row of the shard begins in the global tensor."""
        shard = self.shard
        if shard.dim is None:
            return 0
        _, axis, _, _, inner = self._grid()
        each = prod(shard.global_shape[1 : shard.dim])
        return ((shard.first_expert or 0) * each * axis + shard.start) * inner

    def bounds(self) -> tuple[int, int]:
        """Return the flat range [low, high) of the global tensor around the piece (equal: it is empty)."""
        outer, axis, local, length, inner = self._grid()
        if self.stop <= self.start or length * inner * outer == 0:
            return 0, 0
        first, last = self.start // (local * inner), (self.stop - 1) // (local * inner)
        offset = self._offset()
        low = first * axis * inner + min(self.start - first * local * inner, length * inner)
        high = last * axis * inner + min(self.stop - last * local * inner, length * inner)
        return low + offset, high + offset

    def local(self, element: int) -> int:
        """Return how many elements of the local tensor, padding too, come before an element of the global tensor."""
        _, axis, local, length, inner = self._grid()
        if axis * inner == 0:
            return 0
        row, rest = divmod(max(0, element - self._offset()), axis * inner)
        return row * local * inner + min(rest, length * inner)

    def runs(self) -> tuple[Offsets, Offsets, Offsets]:
        """Return (global offsets, local offsets, lengths) of the runs of elements, ascending; no padding."""
        outer, axis, local, length, inner = self._grid()
        if self.stop <= self.start or length * inner * outer == 0:
            empty = np.empty(0, np.int64)
            return empty, empty, empty
        first, last = self.start // (local * inner), (self.stop - 1) // (local * inner)
        index = np.arange(first, last + 1, dtype=np.int64)
        begin = np.maximum(index * (local * inner), self.start)
        end = np.minimum(index * (local * inner) + length * inner, self.stop)
        shift = index * ((axis - local) * inner) + self._offset()
        real = end > begin
        return (begin + shift)[real], begin[real], (end - begin)[real]

    def count(self) -> int:
        """Return the number of real elements (padding not counted)."""
        return int(self.runs()[2].sum())


class StridedCopy(NamedTuple):
    """`repeat` runs of `length` elements: source + i * source_step -> target + i * target_step."""

    source: int
    target: int
    length: int
    repeat: int
    source_step: int
    target_step: int


def overlap(source: Piece, target: Piece) -> Iterator[StridedCopy]:
    """Yield the copies that bring what `source` has of `target` into it.

    Source offsets count from `source.start`, target offsets from `target.start`. Both pieces must be of one
    global shape. Pieces split along one dim, or one of them whole, need a handful of copies, whatever their
    size.
    """
    from_global, from_local, from_count = source.runs()
    to_global, to_local, to_count = target.runs()
    low = np.searchsorted(from_global + from_count, to_global, side="right")
    high = np.searchsorted(from_global, to_global + to_count, side="left")
    matches = np.maximum(high - low, 0)
    total = int(matches.sum())
    if total == 0:
        return
    to_index = np.repeat(np.arange(len(matches)), matches)
    first_match = np.cumsum(matches) - matches
    from_index = np.arange(total) - np.repeat(first_match - low, matches)
    begin = np.maximum(from_global[from_index], to_global[to_index])
    end = np.minimum((from_global + from_count)[from_index], (to_global + to_count)[to_index])
    sources = from_local[from_index] + begin - from_global[from_index] - source.start
    targets = to_local[to_index] + begin - to_global[to_index] - target.start
    yield from _fold(*_join(sources, targets, end - begin))


def _join(sources: Offsets, targets: Offsets, counts: Offsets) -> tuple[Offsets, Offsets, Offsets]:
    """Join runs that follow each other without a gap in both source and target."""
    touches = (np.diff(sources) == counts[:-1]) & (np.diff(targets) == counts[:-1])
    heads = np.concatenate(([0], np.flatnonzero(~touches) + 1))
    return sources[heads], targets[heads], np.add.reduceat(counts, heads)


def _fold(sources: Offsets, targets: Offsets, counts: Offsets) -> Iterator[StridedCopy]:
    """Fold runs of equal length and equal steps into strided copies."""
    source_steps, target_steps, equal = np.diff(sources), np.diff(targets), np.diff(counts) == 0
    regular = equal[1:] & equal[:-1] & (np.diff(source_steps) == 0) & (np.diff(target_steps) == 0)
    breaks = np.flatnonzero(~regular) + 1  # step i -> i + 1 goes on with another rhythm than the step before
    at, total = 0, len(sources)
    while at < total:
        if at + 1 < total and equal[at]:
            next_break = np.searchsorted(breaks, at, side="right")
            last = int(breaks[next_break]) if next_break < len(breaks) else total - 1
            source_step, target_step = int(source_steps[at]), int(target_steps[at])
        else:
            last, source_step, target_step = at, 0, 0
        repeat = last - at + 1
        yield StridedCopy(int(sources[at]), int(targets[at]), int(counts[at]), repeat, source_step, target_step)
        at = last + 1
