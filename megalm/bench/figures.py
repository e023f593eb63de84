"""The figures of one point, from its lines of metrics. Pure functions; who reads the files is `collect`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARTS = ("data", "compute", "communication")
"""Parts of a step that the training loop measures on rank 0, under `time/data_s` and so on."""
OTHER = "other"
_WARMUP_SHARE, _LEAST_WARMUP = 0.2, 2


@dataclass(frozen=True)
class Figures:
    """What the steps after the warm-up took; times in seconds a step, rates of all ranks together."""

    measured_steps: int
    step_s: float
    """The median; `low` and `high` are the 10th and 90th percentile."""
    step_low_s: float
    step_high_s: float
    tokens_per_s: float
    tokens_low_per_s: float
    tokens_high_per_s: float
    mfu: float | None
    peak_bytes: int | None
    """The most that any rank took."""
    parts_s: dict[str, float] | None
    """Means over the middle half of the steps, `other` being what the measured parts leave; None: not measured."""


def warmup_steps(steps: int) -> int:
    """Return how many steps at the start do not count: a fifth, at least two."""
    return max(_LEAST_WARMUP, math.ceil(_WARMUP_SHARE * steps))


def measured(records: Sequence[Mapping[str, float]], steps: int) -> list[Mapping[str, float]]:
    """Return the training lines after the warm-up of a run of `steps` steps."""
    return [record for record in records if "train/loss" in record and warmup_steps(steps) < record["step"] <= steps]


def figures_of(records: Sequence[Mapping[str, float]], tokens_per_step: int) -> Figures:
    """Return the figures of training lines that `measured` gives, at least one."""
    assert records, "no step was measured"
    times = [record["time/step_s"] for record in records]
    low, median, high = percentile(times, 10), statistics.median(times), percentile(times, 90)
    mfu = [record["perf/mfu"] for record in records if "perf/mfu" in record]
    peaks = [record["memory/peak_bytes"] for record in records if "memory/peak_bytes" in record]
    return Figures(
        measured_steps=len(times),
        step_s=median,
        step_low_s=low,
        step_high_s=high,
        tokens_per_s=tokens_per_step / median,
        tokens_low_per_s=tokens_per_step / high,
        tokens_high_per_s=tokens_per_step / low,
        mfu=statistics.median(mfu) if mfu else None,
        peak_bytes=int(max(peaks)) if peaks else None,
        parts_s=_parts(records),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    return below + (above - below) * (at - math.floor(at))


def _parts(records: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Return the mean of each part; over the middle half by step time, so that they add up and a late step is out."""
    ordered = sorted(records, key=lambda record: record["time/step_s"])
    outside = len(ordered) // 4
    middle = ordered[outside : len(ordered) - outside]
    known = [part for part in PARTS if all(f"time/{part}_s" in record for record in middle)]
    if not known:
        return None
    parts = {part: statistics.fmean(record[f"time/{part}_s"] for record in middle) for part in known}
    step_s = statistics.fmean(record["time/step_s"] for record in middle)
    return {**parts, OTHER: max(0.0, step_s - sum(parts.values()))}


def efficiency(tokens_per_s: float, ranks: int, base_tokens_per_s: float, base_ranks: int) -> float:
    """Return the speed of a rank over that of a rank of the smallest point.

    For strong scaling this is the speed-up over the ratio of ranks, for weak scaling the ratio of tokens/s a rank.
    """
    return tokens_per_s / base_tokens_per_s * base_ranks / ranks
