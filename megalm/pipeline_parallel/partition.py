"""Which layers of the model each piece of the pipeline holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megalm.errors import ConfigError
from megalm.pipeline_parallel.actions import Placement


def partition_layers(layers: int, placement: Placement, explicit: Sequence[int] | None = None) -> list[range]:
    """Return the global layer indices of each place, in order; together they are `range(layers)`.

    Without `explicit` (layers of each place, in the model's order) the places are even; where `layers` does not divide,
    the remainder goes one layer each to places of stages that have fewest layers, of these to those nearest the middle
    first, and so to an end only when every inner stage has one: first the last place, then the first. The ends also
    hold the embedding and the head, and the first stage holds the most live activations under 1F1B, so it is the last
    to be given more.

    Raises ConfigError if a place would have no layer or `explicit` does not fit.
    """
    if explicit is None:
        counts = _even_counts(layers, placement)
    else:
        counts = list(explicit)
        _check_explicit(counts, layers, placement)
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _even_counts(layers: int, placement: Placement) -> list[int]:
    places = placement.places
    if not 1 <= places <= layers:
        raise ConfigError(
            f"parallel.pipeline={placement.stages}{_chunks(placement)} does not fit model.layers={layers}: every stage "
            f"needs a layer{' in each chunk' if placement.chunks > 1 else ''}; "
            f"use 1 to {layers // placement.chunks} stages"
        )
    each, remainder = divmod(layers, places)
    middle = (places - 1) / 2
    counts, more = [each] * places, [0] * placement.stages
    for _ in range(remainder):
        left = (place for place in range(places) if counts[place] == each)
        chosen = min(left, key=lambda place: (more[placement.holder(place)[0]], abs(place - middle), -place))
        counts[chosen] += 1
        more[placement.holder(chosen)[0]] += 1
    return counts


def _check_explicit(counts: list[int], layers: int, placement: Placement) -> None:
    where = f"parallel.partition={counts}"
    if len(counts) != placement.places:
        raise ConfigError(
            f"{where} has {len(counts)} entries but parallel.pipeline={placement.stages}{_chunks(placement)}; give the "
            "layers of each stage" + (", chunk after chunk in the order of the model" if placement.chunks > 1 else "")
        )
    if min(counts) < 1:
        raise ConfigError(f"{where} leaves a stage without a layer; every entry must be at least 1")
    if sum(counts) != layers:
        raise ConfigError(f"{where} adds up to {sum(counts)} but model.layers={layers}; the entries must add up to it")


def _chunks(placement: Placement) -> str:
    return f" with {placement.chunks} chunks a stage" if placement.chunks > 1 else ""
