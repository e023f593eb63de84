"""Long lists of like things, written short."""

from __future__ import annotations

import random

import pytest

from megalm.dry_run.folding import folded


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("", []),
        ("abc", [(1, "abc")]),
        ("abababc", [(3, "ab"), (1, "c")]),
        ("aaaa", [(4, "a")]),
        ("xaabaabaaby", [(1, "x"), (3, "aab"), (1, "y")]),
    ],
)
def test_repeated_patterns_are_one_fold(items: str, expected: list[tuple[int, str]]) -> None:
    assert [(fold.times, "".join(fold.items)) for fold in folded(items)] == expected


def test_folds_unfold_to_the_items() -> None:
    random.seed(0)
    for _ in range(200):
        items = random.choices("abc", k=random.randrange(40))
        assert [item for fold in folded(items) for item in fold.items * fold.times] == items
