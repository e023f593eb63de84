"""Which layers of the model each piece of the pipeline holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megalm.pipeline_parallel.actions import Placement


def partition_layers(layers: int, placement: Placement, explicit: Sequence[int] | None = None) -> list[range]:
    """Return the global layer indices of each place, in order; together they are `range(layers)`.

    Without `explicit` (layers of each place, in the model's order) the places are even; where `layers` does not divide,
    the remainder goes one layer each to places of stages that have fewest layers, of these to those nearest the middle
    first, and so to an end only when every inner stage has one: first the last place, then the first. The ends also
    hold the embedding and the head, and the first stage holds the most live activations under 1F1B, so it is the last
    to be given more.

    That no place is without a layer, and that `explicit` fits, is a rule of recipes.
    """
    counts = _even_counts(layers, placement) if explicit is None else list(explicit)
    assert len(counts) == placement.places and min(counts) >= 1 and sum(counts) == layers, f"{counts} of {layers}"
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _even_counts(layers: int, placement: Placement) -> list[int]:
    places = placement.places
    each, remainder = divmod(layers, places)
    middle = (places - 1) / 2
    counts, more = [each] * places, [0] * placement.stages
    for _ in range(remainder):
        left = (place for place in range(places) if counts[place] == each)
        chosen = min(left, key=lambda place: (more[placement.holder(place)[0]], abs(place - middle), -place))
        counts[chosen] += 1
        more[placement.holder(chosen)[0]] += 1
    return counts
