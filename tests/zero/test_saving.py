"""Which holder of a tensor saves what of it: one copy over all of them, evenly, in parts that are not too small."""

from __future__ import annotations

import pytest

from megalm.zero.saving import SHARED_BYTES, part_of


@pytest.mark.parametrize("numel", [0, 1, 7, 16_384, 16_385, 50_000, 1_000_003])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_the_holders_save_a_tensor_once_in_parts_of_one_size(numel: int, count: int) -> None:
    parts = sorted(part for part in (part_of("x", numel, 4, index, count) for index in range(count)) if part[1])
    edges = [0, *(edge for part in parts for edge in part), numel]
    assert edges[::2] == edges[1::2], "each begins where the one before ends"
    sizes = [stop - start for start, stop in parts]
    if len(parts) > 1:
        assert min(sizes) * 4 >= SHARED_BYTES and max(sizes) - min(sizes) <= 1
    if numel * 4 >= count * SHARED_BYTES:
        assert len(parts) == count, "all take part in a tensor that is large enough"


def test_small_tensors_are_spread_by_their_names() -> None:
    held = [0] * 8
    for layer in range(200):
        for index in range(8):
            start, stop = part_of(f"blocks.{layer}.norm.weight", 4096, 4, index, 8)
            held[index] += stop - start
    assert sum(held) == 200 * 4096
    assert max(held) < 2 * sum(held) / 8, "one rank with everything would have eight times the mean"
