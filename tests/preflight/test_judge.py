"""Outliers: planted ones are found, noise is not."""

from __future__ import annotations

import random

import pytest

from megalm.preflight.judge import majority, slower_than_peers, threshold


@pytest.mark.parametrize("count", [3, 4, 8, 64])
def test_a_node_of_half_the_speed_is_named_among_steady_ones(count: int) -> None:
    rates = {f"node{n}": 100.0 + n % 2 for n in range(count)} | {"slow": 50.0}
    found = slower_than_peers(rates)
    assert list(found) == ["slow"]
    assert found["slow"] == pytest.approx(0.5, abs=0.01)


def test_many_equal_nodes_let_a_smaller_difference_be_named() -> None:
    assert list(slower_than_peers(dict.fromkeys(range(64), 100.0) | {64: 80.0})) == [64]
    assert slower_than_peers(dict.fromkeys(range(4), 100.0) | {4: 80.0}) == {}


def test_ten_percent_of_noise_names_nobody() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        rates = {n: 100.0 * draw.gauss(1.0, 0.1) for n in range(draw.randint(4, 64))}
        assert slower_than_peers(rates) == {}


def test_broken_nodes_do_not_move_the_judgement() -> None:
    rates = dict.fromkeys(range(8), 100.0) | {8: 1.0, 9: 0.0, 10: 2.0}
    assert sorted(slower_than_peers(rates)) == [8, 9, 10]


def test_fast_nodes_are_never_named() -> None:
    assert slower_than_peers(dict.fromkeys(range(8), 100.0) | {8: 1000.0}) == {}


def test_fewer_than_three_cannot_be_told_apart() -> None:
    assert slower_than_peers({0: 1.0, 1: 100.0}) == {}
    assert slower_than_peers({}) == {}


def test_values_of_zero_are_no_error() -> None:
    assert slower_than_peers({0: 0.0, 1: 0.0, 2: 0.0}) == {}


def test_the_threshold_keeps_its_bounds() -> None:
    assert threshold([100.0] * 1000) == 0.85
    assert threshold([100.0] * 1000, nearest=0.5) == 0.5
    assert threshold([1.0, 10.0, 100.0, 1000.0]) == 0.1


def test_the_majority_and_ties() -> None:
    assert majority({0: "a", 1: "b", 2: "b"}, 0) == "b"
    assert majority({0: "a", 1: "b"}, 0) == "a"
    assert majority({0: "c", 1: "a", 2: "a", 3: "b", 4: "b"}, 0) == "a"
