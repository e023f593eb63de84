"""Overlaps of pieces of two shards, against index arithmetic on a small tensor."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.checkpoint.geometry import Piece, overlap
from megalm.distributed.sharding import ShardSpec

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def pieces(draw: st.DrawFn, shape: tuple[int, ...]) -> Piece:
    dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1))) if shape else None
    count = draw(st.integers(1, 4))
    index = draw(st.integers(0, count - 1))
    shard = ShardSpec.whole("x", shape) if dim is None else ShardSpec.split("x", shape, dim, index, count)
    edges = sorted(draw(st.tuples(*[st.integers(0, prod(shard.local_shape))] * 2)))
    return Piece(shard, *edges)


def global_indices(piece: Piece) -> np.ndarray:
    """Return the global flat index of each element of the piece, -1 for padding."""
    shard = piece.shard
    everything = np.arange(prod(shard.global_shape)).reshape(shard.global_shape)
    local = np.full(shard.local_shape, -1)
    if shard.dim is None:
        local[...] = everything
    else:
        rows = np.arange(shard.length)
        local[(slice(None),) * shard.dim + (rows,)] = everything.take(shard.start + rows, shard.dim)
    return local.reshape(-1)[piece.start : piece.stop]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_overlap_copies_exactly_the_common_elements(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    source, target = data.draw(pieces(shape)), data.draw(pieces(shape))
    have, want = global_indices(source), global_indices(target)
    got = np.full(len(want), -1)
    for copy in overlap(source, target):
        for run in range(copy.repeat):
            at, to = copy.source + run * copy.source_step, copy.target + run * copy.target_step
            assert (got[to : to + copy.length] == -1).all(), "an element was copied twice"
            got[to : to + copy.length] = have[at : at + copy.length]
    np.testing.assert_array_equal(got, np.where(np.isin(want, have), want, -1))
    assert target.count() == (want >= 0).sum()
    low, high = target.bounds()
    assert all(low <= index < high for index in want if index >= 0)


def test_shards_of_one_dim_need_a_handful_of_copies_whatever_their_size() -> None:
    shape = (3000, 4096)
    source = Piece(ShardSpec.split("x", shape, 1, 1, 3), 12345, 3_000_000)
    target = Piece(ShardSpec.split("x", shape, 1, 1, 2), 777, 5_000_000)
    assert len(list(overlap(source, target))) <= 5
    assert len(list(overlap(Piece(ShardSpec.whole("x", shape), 0, prod(shape)), target))) <= 3
