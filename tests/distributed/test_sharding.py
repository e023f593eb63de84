"""Shard specs: the parts of a logical tensor tile it, whatever divides."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.distributed.sharding import Fragment, ShardSpec
from tests.shards import Store


@settings(deadline=None, max_examples=100)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), count=st.integers(1, 8), data=st.data())
def test_shards_tile_the_tensor_once_and_have_one_shape(
    shape: tuple[int, ...], count: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    specs = [ShardSpec.split("w", shape, dim, index, count) for index in range(count)]
    assert len({spec.local_shape for spec in specs}) == 1
    assert specs[0].local_shape[dim] == -(-shape[dim] // count)
    assert [spec.start for spec in specs] == sorted(spec.start for spec in specs)
    assert all(0 <= spec.length <= spec.local_shape[dim] for spec in specs)
    assert sum(spec.length for spec in specs) == shape[dim]
    fragments = []
    for spec in specs:
        values = torch.zeros(spec.local_shape)
        values.narrow(dim, 0, spec.length).fill_(1.0)
        fragments.append(Fragment(spec, "weight", 0, values.flatten()))
    Store(fragments).assert_tiled_once()


def test_a_prime_vocabulary_is_padded_on_the_last_rank() -> None:
    last = ShardSpec.split("embedding.weight", (67, 8), 0, 3, 4)
    assert (last.local_shape, last.start, last.length) == ((17, 8), 51, 16)


def test_a_shard_wholly_beyond_the_tensor_is_all_padding() -> None:
    spec = ShardSpec.split("w", (5,), 0, 3, 4)
    assert (spec.local_shape, spec.start, spec.length) == ((2,), 5, 0)


def test_a_whole_tensor_is_not_split_and_a_renamed_one_is_the_same_part() -> None:
    whole = ShardSpec.whole("norm.weight", (8,))
    assert whole.dim is None and whole.global_shape == whole.local_shape == (8,)
    part = ShardSpec.split("a", (7, 3), 0, 1, 2)
    assert part.renamed("b") == ShardSpec("b", (7, 3), (4, 3), 0, 4, 3)
