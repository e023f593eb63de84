"""Hand-made scaling runs: a plan and the metrics of its points, without any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megalm.bench.plan import Plan, Point, point_directory, write_plan

CODE = {"megalm": "0.1.0", "revision": "a" * 40, "python": "3.11.7", "changed": False, "torch": "2.13.0"}


def make_run(out: Path, points: Sequence[Point], steps: int = 10, mode: str = "strong") -> Plan:
    """Write the plan of a scaling run with sequences of 100 tokens, and a folder of logs for each point."""
    plan = Plan("tiny.yaml", [], mode, steps, 100, "tensor 1", "2026-01-01T00:00:00+00:00", dict(CODE), list(points))
    for point in points:
        (point_directory(out, point) / "logs").mkdir(parents=True)
    write_plan(out, plan)
    return plan


def write_steps(out: Path, point: Point, step_s: Sequence[float], **more: float) -> None:
    """Write a training line a step, of the given seconds, then an evaluation; `more` stands in each training line."""
    common = {"train/loss": 1.0, "perf/mfu": 0.25, "memory/peak_bytes": 2**30, **more}
    lines = [{"step": step, **common, "time/step_s": seconds} for step, seconds in enumerate(step_s, start=1)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": len(lines), "evaluate/loss": 1.0}])
    (point_directory(out, point) / "metrics.jsonl").write_text(text)
