"""The points of a scaling run on this machine, one after the other. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalm.answers import counted
from megalm.bench.collect import POINT_LOG
from megalm.bench.machine import MACHINE_FILE, write_machine
from megalm.bench.plan import Plan, Point, point_directory, point_recipe, write_plan
from megalm.config.run import RunConfig
from megalm.errors import LaunchError
from megalm.launch.local import before_start
from megalm.launch.records import LOGS


def check_gpus(config: RunConfig, largest: int, machine: dict[str, Any]) -> None:
    """Raise LaunchError where a point would have more ranks than this machine has GPUs; with none the CPU computes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = machine["gpus"] if visible is None else min(machine["gpus"], len(visible.split(",")) if visible else 0)
    if config.run.device != "cpu" and 0 < count < largest:
        raise LaunchError(
            f"--nproc={largest} is more than the {count} GPUs of this machine, one a rank; use at most {count}, "
            "or run.device=cpu"
        )


def train_command(out: Path, point: Point) -> list[str]:
    """Return the argument list that runs a point."""
    recipe = str(point_recipe(out, point))
    return [sys.executable, "-m", "megalm", "train", recipe, f"--nproc={point.ranks}", "--fresh"]


def run_points(out: Path, plan: Plan, machine: dict[str, Any]) -> None:
    """Run every point, whatever became of those before, and note how each ended; standard error tells how far it is.

    All points give a rank the same number of threads, as many as the largest world leaves for each. A point that fails
    stays without figures, which `collect` explains.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, machine["cores"] // plan.points[-1].ranks))
    for number, point in enumerate(plan.points):
        logs = point_directory(out, point) / LOGS
        write_machine(logs / MACHINE_FILE, {**machine, "threads_a_rank": int(threads)})
        which = f"point {number + 1} of {len(plan.points)}: {counted(point.ranks, 'rank')}, {plan.steps} steps"
        print(f"{which}; {logs / POINT_LOG}", file=sys.stderr, flush=True)
        with open(logs / POINT_LOG, "wb") as log:
            done = subprocess.run(
                train_command(out, point),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": threads},
                preexec_fn=before_start(os.getpid(), ()),  # it is not to outlive this process
                check=False,
            )
        plan.points[number] = replace(point, status=done.returncode)
        write_plan(out, plan)
        if done.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
            raise KeyboardInterrupt
