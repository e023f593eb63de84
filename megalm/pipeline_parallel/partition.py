"""Which layers of the model each pipeline stage holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megalm.errors import ConfigError


def partition_layers(layers: int, stages: int, explicit: Sequence[int] | None = None) -> list[range]:
    """Return the global layer indices of each stage, in order; together they are `range(layers)`.

    Without `explicit` (layers per stage) the stages are even; where `layers` does not divide, the remainder
    goes one layer each to the inner stages, those nearest the middle first, and to an end only when every
    inner stage has one: first the last stage, then the first. The ends also hold the embedding and the head,
    and the first stage holds the most live activations under 1F1B, so it is the last to be given more.

    Raises ConfigError if a stage would have no layer or `explicit` does not fit.
    """
    if explicit is None:
        counts = _even_counts(layers, stages)
    else:
        counts = list(explicit)
        _check_explicit(counts, layers, stages)
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _even_counts(layers: int, stages: int) -> list[int]:
    if not 1 <= stages <= layers:
        raise ConfigError(
            f"parallel.pipeline={stages} does not fit model.layers={layers}: every stage needs a layer; "
            f"use 1 to {layers} stages"
        )
    each, remainder = divmod(layers, stages)
    middle = (stages - 1) / 2
    inner_first = sorted(range(stages), key=lambda stage: (abs(stage - middle), -stage))
    counts = [each] * stages
    for stage in inner_first[:remainder]:
        counts[stage] += 1
    return counts


def _check_explicit(counts: list[int], layers: int, stages: int) -> None:
    where = f"parallel.partition={counts}"
    if len(counts) != stages:
        raise ConfigError(
            f"{where} has {len(counts)} entries but parallel.pipeline={stages}; give the layers of each stage"
        )
    if min(counts) < 1:
        raise ConfigError(f"{where} leaves a stage without a layer; every entry must be at least 1")
    if sum(counts) != layers:
        raise ConfigError(f"{where} adds up to {sum(counts)} but model.layers={layers}; the entries must add up to it")
