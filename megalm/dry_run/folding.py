"""Long lists of like things, written short."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)

_LONGEST = 96


class Fold(NamedTuple, Generic[T]):
    """`items`, so often one after the other."""

    times: int
    items: tuple[T, ...]


def folded(items: Sequence[T]) -> list[Fold[T]]:
    """Return the items in order, runs of a repeated pattern as one fold: abababc -> 3 x (ab), 1 x (c).

    At each place the pattern that covers most is taken, the shortest of those; single items in a row are one fold.
    """
    found: list[Fold[T]] = []
    at = 0
    while at < len(items):
        times, length = _best(items, at)
        piece = tuple(items[at : at + length])
        if times == 1 and found and found[-1].times == 1:
            found[-1] = Fold(1, (*found[-1].items, *piece))
        else:
            found.append(Fold(times, piece))
        at += times * length
    return found


def _best(items: Sequence[T], at: int) -> tuple[int, int]:
    """Return how often a pattern is repeated from `at` on, and its length; (1, 1) where none is."""
    best, covered = (1, 1), 1
    for length in range(1, min(_LONGEST, (len(items) - at) // 2) + 1):
        pattern, times = items[at : at + length], 1
        while items[at + times * length : at + (times + 1) * length] == pattern:
            times += 1
        if times > 1 and times * length > covered:
            best, covered = (times, length), times * length
    return best
