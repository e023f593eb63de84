"""The points of a scaling run as Slurm jobs, one after the other, and a last job that collects them. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalm.bench.plan import JOBS, Plan, Point, clear, point_directory, point_recipe, read_plan, write_plan
from megalm.config.run import RunConfig
from megalm.errors import ConfigError, LaunchError
from megalm.launch import records, slurm
from megalm.launch.jobs import ENDED, job_states
from megalm.launch.slurm import JobRequest

SCRIPT, COLLECT_SCRIPT = "scaling.sbatch", "collect.sbatch"
_RESOLVED = {"MEGALM_POINT": "resolved"}  # tells the script that the recipe holds all settings


@dataclass(frozen=True)
class Job:
    """One sbatch: its arguments without the dependency, and the environment on top of the common one."""

    request: JobRequest
    name: str
    logs: Path
    command: list[str | Path]

    def arguments(self, after: str | None = None) -> list[str]:
        """Return sbatch's argument list; `after` is the job before."""
        return slurm.sbatch_arguments(self.request, self.name, self.logs, self.command, after)


def complete(request: JobRequest, nodes: Sequence[int], folder: Path) -> list[JobRequest]:
    """Return the request of each number of nodes. Raises LaunchError for names that Slurm could misunderstand."""
    request.check()
    for script in (SCRIPT, COLLECT_SCRIPT):
        if not (folder / script).is_file():
            raise LaunchError(f"{folder / script}: missing; copy it from the package's megalm/slurm")
    return [slurm.with_defaults(replace(request, nodes=count), folder / SCRIPT) for count in nodes]


def jobs_of(out: Path, plan: Plan, requests: Sequence[JobRequest]) -> list[Job]:
    """Return the jobs of all points and, last, the one that collects."""
    scripts = out / JOBS
    jobs = []
    for point, request in zip(plan.points, requests, strict=True):
        logs = point_directory(out, point) / records.LOGS
        jobs.append(Job(request, f"scaling-{point.ranks}", logs, [scripts / SCRIPT, point_recipe(out, point)]))
    small = replace(requests[0], nodes=1, gpus_per_node=None, cpus_per_task=None, time=None, notice_s=None)
    return [*jobs, Job(small, "scaling-collect", scripts / records.LOGS, [scripts / COLLECT_SCRIPT, out])]


def refuse_living(out: Path) -> None:
    """Raise ConfigError if jobs of the scaling run that is in `out` are not over: they would write into the new one."""
    known = read_plan(out).job_ids()
    states = job_states() if known else {}
    living = [job for job in known if job in states and states[job]["state"] not in ENDED]
    if living:
        raise ConfigError(
            f"--out={out}: jobs of the scaling run there are not over; wait, or: scancel {' '.join(living)}"
        )


def submit(out: Path, plan: Plan, jobs: Sequence[Job], base: RunConfig) -> str | None:
    """Submit all, each after the one before, noting every id in the plan at once.

    Returns what keeps the collecting job from being submitted, None if nothing does. Raises LaunchError where sbatch
    refuses a point: those submitted before are cancelled, and without any the directory is as if nothing had been.
    """
    records.snapshot(out / JOBS, base, records.script_folder())
    after = None
    for number, job in enumerate(jobs[:-1]):
        try:
            after = slurm.submit(job.arguments(after), _environment(out, job, _RESOLVED))
        except LaunchError:
            if plan.job_ids():
                slurm.withdraw(plan.job_ids())
            else:
                clear(out)
            raise
        plan.points[number] = replace(plan.points[number], job_id=after)
        write_plan(out, plan)
    last = jobs[-1]
    try:
        plan.collect_job = slurm.submit(last.arguments(after), _environment(out, last, {}))
    except LaunchError as error:  # such as a partition that takes no job without GPUs
        return str(error)
    write_plan(out, plan)
    return None


def _environment(out: Path, job: Job, more: Mapping[str, str]) -> dict[str, str]:
    return {**slurm.job_environment(os.environ, job.request, out / JOBS, job.logs), **more}


def ranks_of(requests: Sequence[JobRequest]) -> list[Point]:
    """Return the points that the requests make, without their global batches."""
    return [Point(slurm.world_size(request), 0, request.nodes) for request in requests]
