"""Runs of tokens: which a rank holds, which of them a part of its tensor holds, and how they are taken from rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.distributed.places import Run, from_zigzag, part, pieces, select, to_zigzag, whole, zigzag


def test_a_zigzag_pairs_early_and_late_pieces() -> None:
    assert zigzag(12, 0, 1) == whole(12) == (Run(0, 12),)
    assert [zigzag(12, rank, 3) for rank in range(3)] == [
        (Run(0, 2), Run(10, 2)),
        (Run(2, 2), Run(8, 2)),
        (Run(4, 2), Run(6, 2)),
    ]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_part_of_places_is_what_a_slice_of_the_tensor_holds(lengths: list[int], data: st.DataObject) -> None:
    places = tuple(Run(10 * n, length) for n, length in enumerate(lengths))
    row = torch.arange(100)
    held = select(row, places, dim=0)
    start = data.draw(st.integers(0, len(held) - 1))
    length = data.draw(st.integers(1, len(held) - start))
    found = part(places, start, length)
    assert torch.equal(select(row, found, dim=0), held[start : start + length])
    assert torch.equal(torch.cat(list(pieces(held, places, dim=0))), held)


def test_one_run_is_a_view() -> None:
    row = torch.arange(10)
    assert select(row, (Run(3, 4),), dim=0).data_ptr() == row[3:].data_ptr()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_are_put_together_of_the_ranks_tokens(ranks: int) -> None:
    rows_BTX = torch.arange(2 * 24 * 3).view(2, 24, 3)
    parts = to_zigzag(rows_BTX, ranks)
    for rank in range(ranks):
        assert torch.equal(parts[rank], select(rows_BTX, zigzag(24, rank, ranks)))
    assert torch.equal(from_zigzag(parts), rows_BTX)
