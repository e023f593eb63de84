"""What the commands of `megalm bench` do with their parsed arguments; each function returns the exit status."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.answers import answer, show
from megalm.errors import ConfigError
from megalm.launch.checks import check_data, check_device

if TYPE_CHECKING:
    from megalm.bench.plan import Plan

_SLURM = ("gpus_per_node", "cpus_per_task", "time", "partition", "account", "qos", "exclude")


def bench_scaling(args: Namespace) -> int:
    """`megalm bench scaling`: check every point, then run all here or submit them."""
    for what, sizes in (("--nodes", args.nodes), ("--nproc", args.nproc)):
        if sizes is not None and len(set(sizes)) < len(sizes):
            raise ConfigError(f"{what}={','.join(map(str, sizes))} names a number twice; leave one out")
    return _scaling_here(args) if args.nodes is None else _scaling_on_slurm(args)


def _scaling_here(args: Namespace) -> int:
    from megalm.bench import here
    from megalm.bench.collect import collect
    from megalm.bench.machine import this_machine
    from megalm.bench.plan import Point, check_place, make_plan, prepare

    for name in _SLURM:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --nodes; leave it out")
    out = Path(args.out).absolute()
    points = [Point(ranks, 0) for ranks in sorted(args.nproc)]
    plan, configs = make_plan(args.recipe, args.overrides, points, args.mode, args.steps, out)
    check_data(configs[0])
    check_device(configs[0])
    machine = this_machine()
    here.check_gpus(configs[0], points[-1].ranks, machine)
    check_place(out, args.fresh)
    if args.dry_run:
        return _dry_run(args, out, plan, [here.train_command(out, point) for point in plan.points])
    prepare(out, plan, configs)
    here.run_points(out, plan, machine)
    return _tell(collect(out), out, args.json)


def _scaling_on_slurm(args: Namespace) -> int:
    from megalm.bench import submit
    from megalm.bench.plan import PICTURE_FILE, TABLE_FILE, check_place, make_plan, prepare
    from megalm.launch.records import script_folder
    from megalm.launch.slurm import JobRequest, log_folder, require_program

    out = log_folder("--out", args.out)
    request = JobRequest(**{name: getattr(args, name) for name in _SLURM})
    requests = submit.complete(request, sorted(args.nodes), script_folder())
    plan, configs = make_plan(args.recipe, args.overrides, submit.ranks_of(requests), args.mode, args.steps, out)
    check_data(configs[0])
    check_place(out, args.fresh)
    jobs = submit.jobs_of(out, plan, requests)
    if args.dry_run:
        return _dry_run(args, out, plan, [job.arguments() for job in jobs])
    require_program("sbatch", "run this on a login node of the cluster, or give --nproc instead of --nodes")
    if args.fresh and out.exists():
        submit.refuse_living(out)
    prepare(out, plan, configs)
    refusal = submit.submit(out, plan, jobs, configs[0])
    later = f"megalm bench collect {shlex.quote(str(out))}"
    result = {
        "points": [f"{point.nodes} nodes, {point.ranks} ranks: job {point.job_id}" for point in plan.points],
        "job_ids": [point.job_id for point in plan.points],
        "collect_job_id": plan.collect_job,
        "out": str(out),
        "table": str(out / TABLE_FILE),
        "picture": str(out / PICTURE_FILE),
    }
    if refusal is not None:
        result["collect"] = f"the collecting job was refused ({refusal}); when the others are over: {later}"
    return answer(result, args.json)


def _dry_run(args: Namespace, out: Path, plan: Plan, commands: Sequence[Sequence[str]]) -> int:
    """Print what would be run."""
    if args.json:
        points = [{"ranks": point.ranks, "global_batch": point.global_batch} for point in plan.points]
        return answer({"out": str(out), "points": points, "commands": [list(command) for command in commands]}, True)
    return show("\n".join(shlex.join(command) for command in commands))


def bench_collect(args: Namespace) -> int:
    """`megalm bench collect`: figures, table and picture of what a scaling run has come to so far."""
    from megalm.bench.collect import collect

    out = Path(args.out).absolute()
    return _tell(collect(out), out, args.json)


def _tell(result: dict[str, Any], out: Path, as_json: bool) -> int:
    """Print the table, or all as JSON, and what is missing; return 1 if something is."""
    from megalm.bench.collect import missing
    from megalm.bench.plan import PICTURE_FILE
    from megalm.bench.table import markdown

    if as_json:
        answer(result, as_json)
    else:
        where = f"picture: {out / PICTURE_FILE}" if result["baseline_ranks"] is not None else "no picture"
        show(f"{markdown(result)}\n{where}")
    problem = missing(result)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
    return int(problem is not None)
