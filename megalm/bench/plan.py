"""What a scaling run measures: its points, one a world size, and `plan.json`, which says so to whoever collects them.

Owns the directory OUT: `plan.json`, `points/ranks-8/` (the run of a point), `points/ranks-8.yaml` (its resolved
recipe), `jobs/` (what was sent to Slurm). The figures made of it are `collect`'s. No torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megalm.answers import counted
from megalm.config.load import dump_yaml, load_recipe, load_resolved
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.files import write_durably
from megalm.launch.checks import check_world
from megalm.launch.records import LOGS, code_identity
from megalm.train.run_identity import IDENTITY_FILE

PLAN_FILE, POINTS, JOBS = "plan.json", "points", "jobs"
JSON_FILE, TABLE_FILE, PICTURE_FILE = "scaling.json", "scaling.md", "scaling.png"
FORMAT = "megalm-scaling-1"
STRONG, WEAK = "strong", "weak"
# What a point sets itself: steps are alike; the checkpoint and the whole evaluation at the end would only take time.
_SETTINGS = {
    "checkpoint.every": "0",
    "checkpoint.at_end": "false",
    "evaluate.every": "0",
    "evaluate.sequences": "1",
    "log.every": "1",
    "train.pad_batch": "false",
    **dict.fromkeys(("batch_ramp.start", "batch_ramp.increment", "batch_ramp.every"), "null"),
    **dict.fromkeys(("sequence_warmup.start", "sequence_warmup.every"), "null"),
}
_OPTIONS = {"run.dir": "--out", "train.stop_at": "--steps"}
_PACKAGES = ("torch", "triton", "deepspeed", "numpy")


@dataclass
class Point:
    """One world size."""

    ranks: int
    global_batch: int
    nodes: int | None = None
    """None: all ranks on this machine."""
    job_id: str | None = None
    status: int | None = None
    """How the processes on this machine ended; None: not yet, or by Slurm."""


@dataclass
class Plan:
    """What `plan.json` holds; the points stand in ascending order of ranks."""

    recipe: str
    """As it was given."""
    overrides: list[str]
    mode: str
    """STRONG, the same global batch for all points, or WEAK, one that grows with the ranks."""
    steps: int
    sequence: int
    layout: str
    date: str
    """Time of the start in UTC, ISO 8601."""
    code: dict[str, Any]
    """megalm's version and git revision, Python's and the packages' versions."""
    points: list[Point] = field(default_factory=list)
    collect_job: str | None = None
    format: str = FORMAT

    def job_ids(self) -> list[str]:
        """Return the jobs of the points and the one that collects, as far as they were submitted."""
        found = [*(point.job_id for point in self.points), self.collect_job]
        return [job_id for job_id in found if job_id is not None]


def point_directory(out: Path, point: Point) -> Path:
    """Return the run.dir of a point."""
    return out / POINTS / f"ranks-{point.ranks}"


def point_recipe(out: Path, point: Point) -> Path:
    """Return the file of a point's resolved recipe."""
    return out / POINTS / f"ranks-{point.ranks}.yaml"


def batch_of(global_batch: int, ranks: int, smallest: int, mode: str) -> int:
    """Return the global batch of a point: in weak scaling `global_batch` is that of the `smallest` world.

    Where both worlds fit the layout this is exact, for then the smallest one's copies of the model divide its batch.
    """
    return global_batch if mode == STRONG else global_batch * ranks // smallest


def make_plan(
    recipe: str, overrides: Sequence[str], points: Sequence[Point], mode: str, steps: int, out: Path
) -> tuple[Plan, list[RunConfig]]:
    """Return the plan and the config of each point, all checked; `points` ascend, their global batches are set here.

    Raises ConfigError, which names the world size that does not fit, for a recipe that cannot train on each of them.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _OPTIONS:
            raise ConfigError(f"{override}: {key} is set for each point; use {_OPTIONS[key]} instead")
        if key in _SETTINGS:
            raise ConfigError(f"{override}: {key} is {_SETTINGS[key]} in each point; leave it out")
    base = load_recipe(recipe, overrides)
    if base.known_steps is None:
        epochs = base.train.epochs
        raise ConfigError(f"train.epochs={epochs:g} leaves steps open; add train.epochs=null train.steps={steps}")
    if steps > base.steps:
        raise ConfigError(
            f"--steps={steps} is more than train.steps={base.steps}; use at most {base.steps}, "
            f"or add train.steps={steps}"
        )
    configs = []
    for point in points:
        point.global_batch = batch_of(base.train.global_batch, point.ranks, points[0].ranks, mode)
        own = _SETTINGS | {"train.stop_at": str(steps), "train.global_batch": str(point.global_batch)}
        own["run.dir"] = json.dumps(str(point_directory(out, point)))
        where = "" if point.nodes is None else f"{counted(point.nodes, 'node')}, "
        try:
            config = load_recipe(recipe, [*overrides, *(f"{key}={value}" for key, value in own.items())])
            check_world(config, point.ranks)
        except ConfigError as error:
            raise ConfigError(f"the point of {where}{counted(point.ranks, 'rank')}: {error}") from error
        configs.append(config)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    plan = Plan(recipe, list(overrides), mode, steps, base.model.sequence, layout_of(base), now, own_code())
    plan.points = list(points)
    return plan, configs


def layout_of(config: RunConfig) -> str:
    """Return in a few words how the model is split and computed."""
    parallel = config.parallel
    more = "".join(
        f", {axis} {getattr(parallel, axis)}" for axis in ("context", "expert") if getattr(parallel, axis) > 1
    )
    return f"tensor {parallel.tensor}, pipeline {parallel.pipeline}{more}, ZeRO {config.zero.stage}, {config.precision}"


def own_code() -> dict[str, Any]:
    """Return the versions that figures depend on; `changed`: whether the working tree differed from the revision."""
    code, _ = code_identity()
    packages = {name: code["packages"][name] for name in _PACKAGES if name in code["packages"]}
    kept = {name: code[name] for name in ("megalm", "revision", "python")}
    return {**kept, "changed": bool(code.get("changed")), **packages}


def check_place(out: Path, fresh: bool) -> None:
    """Raise ConfigError unless a scaling run may begin in `out`: none lies there, or `fresh` is to remove it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is no directory; choose another")
    if (out / PLAN_FILE).exists():
        before = read_plan(out)
        if not fresh:
            raise ConfigError(
                f"--out={out} holds the scaling run of {before.date}; choose another, or --fresh to remove it"
            )
    else:
        names = (POINTS, JOBS, JSON_FILE, TABLE_FILE, PICTURE_FILE, IDENTITY_FILE)
        found = [name for name in names if (out / name).exists()]
        if found:
            raise ConfigError(
                f"--out={out} holds {', '.join(found)} but no {PLAN_FILE}, so whose they are is unknown; choose another"
            )


def prepare(out: Path, plan: Plan, configs: Sequence[RunConfig]) -> None:
    """Remove an earlier scaling run, then write the plan and the recipes. Raises ConfigError for a bad directory."""
    try:
        clear(out)
        for point, config in zip(plan.points, configs, strict=True):
            (point_directory(out, point) / LOGS).mkdir(parents=True)
            point_recipe(out, point).write_text(dump_yaml(config), encoding="utf-8")
        write_plan(out, plan)
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written ({error.strerror}); choose another") from error


def clear(out: Path) -> None:
    """Remove what a scaling run has written, its plan last; nothing else. Raises OSError."""
    for name in (POINTS, JOBS):
        if (out / name).exists():
            shutil.rmtree(out / name)
    for name in (JSON_FILE, TABLE_FILE, PICTURE_FILE, PLAN_FILE):
        (out / name).unlink(missing_ok=True)


def write_plan(out: Path, plan: Plan) -> None:
    """Write `plan.json`, whole or not at all. Raises OSError."""
    write_durably(out / PLAN_FILE, (json.dumps(asdict(plan), indent=1) + "\n").encode())


def read_plan(out: Path) -> Plan:
    """Return the plan of a scaling run, or what its points show where `scaling.sbatch` was submitted by hand.

    Raises ConfigError where there is none, or one that is damaged.
    """
    path = out / PLAN_FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**{**known, "points": [Point(**point) for point in known["points"]]})
        if plan.format != FORMAT:
            raise ValueError("not a plan of this version")
    except FileNotFoundError:
        return _plan_by_hand(out)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: no plan of a scaling run ({' '.join(str(error).split())})") from error
    return plan


def _plan_by_hand(out: Path) -> Plan:
    """Return the plan that the runs in `out/points` followed."""
    found = []
    for directory in (out / POINTS).glob("ranks-*"):
        ranks = directory.name.removeprefix("ranks-")
        if ranks.isdecimal() and (directory / "config.yaml").is_file():
            config = load_resolved(directory)
            found.append((Point(int(ranks), config.train.global_batch), config))
    if not found:
        raise ConfigError(f"{out}: no points of a scaling run; give the --out of megalm bench scaling")
    found.sort(key=lambda pair: pair[0].ranks)
    base = found[0][1]
    mode = STRONG if len({point.global_batch for point, _ in found}) == 1 else WEAK
    steps = base.train.stop_at or base.steps
    now = datetime.now(UTC).isoformat(timespec="seconds")
    plan = Plan(str(out), [], mode, steps, base.model.sequence, layout_of(base), now, own_code())
    plan.points = [point for point, _ in found]
    return plan
