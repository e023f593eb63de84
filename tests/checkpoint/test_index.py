"""What ranks tell of their pieces, and what becomes of it: few rows, whatever the number of ranks."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.checkpoint.geometry import Piece, overlap
from megalm.checkpoint.index import collect, told
from megalm.checkpoint.manifest import Entry
from megalm.checkpoint.names import file_name
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError

SHAPES = {f"blocks.{layer}.{name}": shape for layer in range(9) for name, shape in (("up", (7, 30)), ("norm", (30,)))}
STATES = ("weight", "exp_avg")


def rows_of(ranks: int, tensor: int = 1) -> list[list[dict[str, Any]]]:
    """Return what each rank has of `SHAPES` under ZeRO 3, `up` split over `tensor` ranks, tensor fastest."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(ranks * tensor)]
    for kind in STATES:
        for name, shape in SHAPES.items():
            dim = 1 if len(shape) > 1 else None
            for index in range(tensor if dim else 1):
                spec = ShardSpec.whole(name, shape) if dim is None else ShardSpec.split(name, shape, dim, index, tensor)
                size = prod(spec.local_shape)
                part = -(-size // ranks)
                for rank in range(ranks):
                    own = Piece(spec, min(rank * part, size), min((rank + 1) * part, size))
                    if own.stop > own.start:
                        file = file_name(rank * tensor + index, "weight" if kind == "weight" else "optimizer")
                        found[rank * tensor + index].append(Entry(kind, "F32", file, own).to_json())
    return found


def collected(ranks: list[list[dict[str, Any]]]) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], int]:
    """Return the rows by tensor, and the number of lists that came together."""
    reports, lists = [], {}
    for rank, rows in enumerate(ranks):
        report, some = told(rank, rows)
        reports.append(report)
        lists |= some
    return collect(reports, lists), len(lists)


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (7, 1), (64, 2), (300, 3)])
def test_a_row_stands_for_the_even_parts_of_all_ranks(ranks: int, tensor: int) -> None:
    told_rows = rows_of(ranks, tensor)
    tensors, lists = collected(told_rows)
    for (_, name), rows in tensors.items():
        assert len(rows) == (tensor if "up" in name else 1), rows
    assert lists <= 8 * tensor, "where tensors end, and else equal ones"
    pieces = [piece for rows in tensors.values() for row in rows for piece in Entry.from_json(row).pieces()]
    assert sorted(str(piece.to_json()) for piece in pieces) == sorted(str(row) for rows in told_rows for row in rows)


def test_what_one_rank_has_besides_does_not_make_its_even_parts_others() -> None:
    ranks = rows_of(8)
    spec = ShardSpec.whole("router.bias", (5,))
    ranks[3].append(Entry("weight", "F32", file_name(3, "weight"), Piece(spec, 0, 5)).to_json())
    tensors, _ = collected(ranks)
    assert all(len(rows) == 1 for rows in tensors.values())
    assert tensors["weight", "router.bias"][0]["flat"] == [0, 5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ranks: ranks.pop(40), "missing"),
        (lambda ranks: ranks.__delitem__(slice(52, None)), "missing"),
        (lambda ranks: ranks.append(ranks[20]), "twice"),
        (lambda ranks: ranks[40].pop(4), r"blocks.4.up \(weight\).* elements 160 to 164 are missing"),
        (lambda ranks: ranks[9][0].update(dtype="BF16"), '"BF16" and "F32"'),
    ],
)
def test_a_gap_or_a_double_in_a_run_is_named(change: Any, says: str) -> None:
    ranks = rows_of(64)
    change(ranks)
    with pytest.raises(CheckpointError, match=says):
        collected(ranks)


def test_other_distances_and_files_are_other_rows() -> None:
    spec = ShardSpec.whole("x", (12,))
    places = [(0, "weight"), (1, "weight"), (2, "weight-1"), (3, "weight-1"), (9, "weight"), (5, "weight")]
    ranks: list[list[dict[str, Any]]] = [[] for _ in range(10)]
    for part, (rank, file) in enumerate(places):
        ranks[rank].append(Entry("weight", "F32", file_name(rank, file), Piece(spec, 2 * part, 2 * part + 2)).to_json())
    tensors, _ = collected(ranks)
    assert [row["flat"] for row in tensors["weight", "x"]] == [[0, 4, 2, 1], [4, 8, 2, 1], [8, 10], [10, 12]]


def test_a_part_of_a_large_run_is_found_without_the_rest() -> None:
    spec = ShardSpec.whole("x", (10**15,))
    run = Entry("weight", "F32", file_name(3, "weight"), Piece(spec, 0, 10**15), 10**7, 4)
    found = list(run.pieces(10**14 - 1, 10**14 + 1))
    assert [(entry.file, entry.piece.start) for entry in found] == [
        ("rank-39999999-weight.safetensors", 10**14 - 10**7),
        ("rank-40000003-weight.safetensors", 10**14),
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_all_pieces_that_overlap_are_found(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)))

    def shard() -> ShardSpec:
        dim = data.draw(st.sampled_from([None, *range(len(shape))]))
        if dim is None:
            return ShardSpec.whole("x", shape)
        count = data.draw(st.integers(1, 3))
        return ShardSpec.split("x", shape, dim, data.draw(st.integers(0, count - 1)), count)

    here, there = shard(), shard()
    start, stop = sorted(data.draw(st.integers(0, prod(there.local_shape))) for _ in range(2))
    target, size = Piece(there, start, stop), data.draw(st.integers(1, 4))
    run = Entry("weight", "F32", file_name(2, "weight"), Piece(here, 0, prod(here.local_shape)), size, 3)
    every = list(run.pieces())
    assert [entry.file for entry in every] == [file_name(2 + 3 * index, "weight") for index in range(run.count)]
    near = list(run.pieces(*target.bounds()))
    assert [entry for entry in every if list(overlap(entry.piece, target))] == [
        entry for entry in near if list(overlap(entry.piece, target))
    ]
    low, high = target.bounds()
    real = [entry.piece.bounds() for entry in near if entry.piece.count()]
    assert len(real) <= sum(begin < high and end > low for begin, end in real) + 2, "and few others"
