"""Which values stand out from the median of all: robust, and deaf to ordinary noise. No torch, pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

NOISE = 0.1
"""The relative standard deviation that healthy machines are believed to have before they are measured."""

_BELIEF = 8  # as many machines as that belief is worth
_SIGMAS = 5.0
_LEAST_PEERS = 3
NEAREST, _FARTHEST = 0.85, 0.1  # a threshold never lies nearer to the median, nor farther from it


def threshold(values: list[float], nearest: float = NEAREST) -> float:
    """Return the share of the median below which a value stands out.

    Five standard deviations below 1. The deviation joins the measured one (1.48 times the median absolute deviation,
    which a few broken machines do not move) with a prior of 10% that is worth 8 machines: of four machines, whose
    spread says little, one must be 40% slower to be named; of 64 equal ones 15% suffice.
    """
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values) / middle if middle > 0 else 0.0
    variance = (len(values) * spread**2 + _BELIEF * NOISE**2) / (len(values) + _BELIEF)
    return max(_FARTHEST, min(nearest, 1.0 - _SIGMAS * variance**0.5))


def slower_than_peers(rates: Mapping[K, float], nearest: float = NEAREST) -> dict[K, float]:
    """Return those that are far below the median, with their share of it; none among fewer than three."""
    values = list(rates.values())
    if len(values) < _LEAST_PEERS:
        return {}
    middle, limit = statistics.median(values), threshold(values, nearest)
    return {name: rate / middle for name, rate in rates.items() if rate < limit * middle}


def majority(values: Mapping[K, str], first: K) -> str:
    """Return the commonest value; of equally common ones that of `first`, if it is among them."""
    counts: dict[str, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    most = max(counts.values())
    best = [value for value, count in counts.items() if count == most]
    return values[first] if values[first] in best else best[0]
