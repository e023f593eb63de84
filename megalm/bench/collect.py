"""`megalm bench collect`: the points of a scaling run become figures, a table and a picture; what is missing says why.

Owns the meaning of `scaling.json`. May be called at any time: points that are not over are shown as such. No torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megalm.answers import counted
from megalm.bench import plan as plans
from megalm.bench.figures import efficiency, figures_of, measured, warmup_steps
from megalm.bench.machine import MACHINE_FILE, describe
from megalm.bench.plan import Plan, Point, point_directory
from megalm.bench.table import markdown
from megalm.errors import ConfigError, LaunchError
from megalm.files import write_durably
from megalm.launch.jobs import ENDED, accounted, job_states
from megalm.launch.records import LOGS
from megalm.launch.requeue import error_line, rank_logs
from megalm.train.metrics_file import METRICS_FILE, read_metrics

MEASURED, FAILED, UNFINISHED = "measured", "failed", "not over"
POINT_LOG = "train.log"
"""What a point said on this machine, in its folder of logs."""


def collect(out: Path) -> dict[str, Any]:
    """Write `scaling.json`, `scaling.md` and, where a point was measured, `scaling.png`; return what the first holds.

    Raises ConfigError for a directory that holds no scaling run or cannot be written.
    """
    from megalm.bench.picture import draw

    plan = plans.read_plan(out)
    result = summary(out, plan)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    try:
        write_durably(out / plans.JSON_FILE, text.encode())
        write_durably(out / plans.TABLE_FILE, markdown(result).encode())
        if result["baseline_ranks"] is None:
            (out / plans.PICTURE_FILE).unlink(missing_ok=True)
        else:
            write_durably(out / plans.PICTURE_FILE, draw(result))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); free space, or look at its rights") from error
    return result


def summary(out: Path, plan: Plan) -> dict[str, Any]:
    """Return the whole of `scaling.json`: what was asked, on what, and each point with its figures or its reason."""
    states = _states(plan)
    points = [_point(out, plan, point, states) for point in plan.points]
    done = [point for point in points if point["state"] == MEASURED]
    for point in done:
        base = done[0]
        point["efficiency"] = efficiency(point["tokens_per_s"], point["ranks"], base["tokens_per_s"], base["ranks"])
    machines = [machine for point in points if (machine := _machine(out, point["ranks"])) is not None]
    return {
        "format": plans.FORMAT,
        "recipe": plan.recipe,
        "overrides": plan.overrides,
        "mode": plan.mode,
        "layout": plan.layout,
        "sequence": plan.sequence,
        "steps": plan.steps,
        "warmup_steps": warmup_steps(plan.steps),
        "started": plan.date,
        "collected": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": plan.code,
        "machine": "; ".join(dict.fromkeys(describe(machine) for machine in machines)) or "a machine that nobody noted",
        "machines": machines,
        "baseline_ranks": done[0]["ranks"] if done else None,
        "points": points,
    }


def missing(result: Mapping[str, Any]) -> str | None:
    """Return a line on the points that have no figures, None where all have."""
    points = result["points"]
    lines = [f"{counted(point['ranks'], 'rank')}: {point['why']}" for point in points if point["state"] != MEASURED]
    return f"without figures, {len(lines)} of {counted(len(points), 'point')}: {'; '.join(lines)}" if lines else None


def _point(out: Path, plan: Plan, point: Point, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a point's figures, or why there are none."""
    directory = point_directory(out, point)
    with suppress(OSError):  # a run that has not begun
        records = read_metrics(directory / METRICS_FILE)
        steps = measured(records, plan.steps)
        if steps and steps[-1]["step"] == plan.steps:
            found = asdict(figures_of(steps, point.global_batch * plan.sequence))
            return {**asdict(point), "run": str(directory), "state": MEASURED, "why": None, **found}
        return {**asdict(point), "run": str(directory), **_reason(out, plan, point, states, _last_step(records))}
    return {**asdict(point), "run": str(directory), **_reason(out, plan, point, states, 0)}


def _last_step(records: list[dict[str, float]]) -> int:
    return int(max((record["step"] for record in records if "train/loss" in record), default=0))


def _reason(out: Path, plan: Plan, point: Point, states: Mapping[str, Mapping[str, Any]], step: int) -> dict[str, str]:
    """Return `state` and `why` of a point that has no figures: what Slurm says of its job, what its logs say."""
    job = states.get(point.job_id or "")
    done = f"{step} of {plan.steps} steps"
    if job is not None and job["state"] not in ENDED:
        return {"state": UNFINISHED, "why": f"job {point.job_id} is {job['state']}, {done}"}
    logs = point_directory(out, point) / LOGS
    others = [*sorted(logs.glob("job-*.log")), logs / POINT_LOG]
    error = error_line([*(rank_logs(logs) if logs.is_dir() else []), *others], {})
    if error is not None:
        return {"state": FAILED, "why": f"{done}: {error.replace(f'{out}/', '')}"}
    if job is not None and job["state"] != "UNKNOWN":
        return {"state": FAILED, "why": f"{done}: job {point.job_id} is {job['state']} ({job['reason']})"}
    if point.status is not None:
        return {"state": FAILED, "why": f"{done}: ended with status {point.status}"}
    return {"state": UNFINISHED, "why": f"{done}, and no log says why"}


def _states(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what Slurm says of the jobs of the points; nothing where there is no Slurm to ask."""
    jobs = [point.job_id for point in plan.points if point.job_id is not None]
    if not jobs or shutil.which("squeue") is None:
        return {}
    try:
        known = job_states()
    except LaunchError:  # a node that may not ask: the logs tell what they can
        return {}
    return {job: known.get(job) or accounted(job) for job in jobs}


def _machine(out: Path, ranks: int) -> dict[str, Any] | None:
    """Return what a point has noted of its first node, with its `ranks`; None where it came to nothing."""
    path = point_directory(out, Point(ranks, 0)) / LOGS / MACHINE_FILE
    try:
        return {"ranks": ranks, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return None
