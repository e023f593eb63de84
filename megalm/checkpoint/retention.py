"""Which checkpoints of a run stay: the newest ones, each n-th step's, and the best by a metric.

The metric of a checkpoint lies in its state, so that a resumed run, and anyone else, knows it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.names import STATE, STATE_LIMIT_BYTES
from megalm.checkpoint.tensor_file import open_regular

METRIC = "metric"
"""The key of a checkpoint's state under which its metric stands: {"name", "value", "step"}."""


@dataclass(frozen=True)
class Keep:
    """What stays."""

    last: int
    """So many of the newest."""
    every: int | None = None
    """Those of each step that this divides, for ever."""
    best: str | None = None
    """The one with the least value of this metric."""


def superfluous(steps: Iterable[int], keep: Keep, metrics: Mapping[int, float]) -> list[int]:
    """Return the steps whose checkpoints are to be deleted; `metrics` are those that are known, by step."""
    newest_first = sorted(steps, reverse=True)
    known = [(metrics[step], -step) for step in newest_first if math.isfinite(metrics.get(step, math.nan))]
    best = -min(known)[1] if known and keep.best is not None else None
    return [
        step
        for step in newest_first[keep.last :]
        if step != best and not (keep.every is not None and step % keep.every == 0)
    ]


def metric_of(state: Mapping[str, Any], name: str | None) -> float | None:
    """Return the value of the metric `name` in a checkpoint's state, None where it has none."""
    found = state.get(METRIC)
    if not isinstance(found, Mapping) or found.get("name") != name:
        return None
    value = found.get("value")
    return float(value) if isinstance(value, int | float) else None


def stored_metric(checkpoint: Path, name: str) -> float | None:
    """Return the metric `name` of a checkpoint on the disk; None for one without, or whose state cannot be read."""
    try:
        with open_regular(checkpoint / STATE) as file:
            state = json.loads(file.read(STATE_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return metric_of(state, name) if isinstance(state, dict) else None
