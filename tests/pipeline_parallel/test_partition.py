"""Every layer has one stage, in order; the ends get fewer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.pipeline_parallel.actions import Placement
from megalm.pipeline_parallel.partition import partition_layers


def counts(layers: int, stages: int, explicit: list[int] | None = None) -> list[int]:
    return [len(part) for part in partition_layers(layers, Placement(stages), explicit)]


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda stages: st.tuples(st.integers(stages, 200), st.just(stages))))
def test_stages_cover_all_layers_in_order_and_differ_by_at_most_one(sizes: tuple[int, int]) -> None:
    layers, stages = sizes
    parts = partition_layers(layers, Placement(stages))
    assert [layer for part in parts for layer in part] == list(range(layers))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths[0], lengths[-1]) <= min(lengths[1:-1], default=max(lengths))
    assert lengths[0] <= lengths[-1]


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (8, 4, [2, 2, 2, 2]),
        (9, 4, [2, 2, 3, 2]),
        (10, 4, [2, 3, 3, 2]),
        (11, 4, [2, 3, 3, 3]),
        (5, 2, [2, 3]),
        (7, 3, [2, 3, 2]),
        (3, 1, [3]),
    ],
)
def test_the_remainder_goes_to_the_middle(layers: int, stages: int, expected: list[int]) -> None:
    assert counts(layers, stages) == expected


def test_explicit_partition_is_taken_as_it_is() -> None:
    assert partition_layers(6, Placement(3), [1, 4, 1]) == [range(0, 1), range(1, 5), range(5, 6)]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.booleans(), st.integers(0, 60))
def test_chunks_cover_all_layers_and_stages_differ_by_at_most_one(p: int, v: int, folded: bool, more: int) -> None:
    placement = Placement(p, v, folded)
    parts = partition_layers(p * v + more, placement)
    assert [layer for part in parts for layer in part] == list(range(p * v + more))
    held = [sum(len(parts[placement.place(stage, chunk)]) for chunk in range(v)) for stage in range(p)]
    assert max(held) - min(held) <= 1
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_partition_of_chunks_is_given_in_the_order_of_the_model() -> None:
    placement = Placement(2, 2)
    assert partition_layers(7, placement, [1, 2, 3, 1]) == [range(0, 1), range(1, 3), range(3, 6), range(6, 7)]


@pytest.mark.parametrize("folded", [False, True])
def test_places_and_holders_are_each_others_inverse(folded: bool) -> None:
    placement = Placement(4, 3, folded)
    holders = [placement.holder(place) for place in range(placement.places)]
    assert [placement.place(*holder) for holder in holders] == list(range(12)) and len(set(holders)) == 12
    assert [stage for stage, _ in holders[4:8]] == ([3, 2, 1, 0] if folded else [0, 1, 2, 3])
