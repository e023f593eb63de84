"""What the commands of `megalm launch` do with their parsed arguments; each function returns the exit status."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from megalm.answers import answer, show
from megalm.launch.checks import check_data, check_rules, check_world


def launch_slurm(args: Namespace) -> int:
    """`megalm launch slurm`: check the recipe and its data against the world that is asked for, then submit."""
    from megalm.config.load import load_recipe
    from megalm.launch import records, slurm
    from megalm.launch.jobs import refuse_living
    from megalm.train.run_directory import check_run

    names = ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition", "account", "qos", "container", "exclude")
    request = slurm.JobRequest(
        **{name: getattr(args, name) for name in names}, chain=args.chain, preflight=args.preflight
    )
    request.check()
    request = slurm.with_defaults(request, records.script_folder() / slurm.SCRIPT)
    config = load_recipe(args.recipe, args.overrides)
    slurm.log_folder("run.dir", config.run.dir)
    check_world(config, slurm.world_size(request))
    data = check_data(config)
    config = config.with_windows(len(data.windows(config.model.sequence, config.data.rows)))
    check_rules(config, data)
    check_run(config, data.fingerprint, data.tokenizer_fingerprint)
    if not args.dry_run:
        refuse_living(Path(config.run.dir).absolute())
    result = slurm.launch(config, request, args.dry_run)
    if args.json:
        return answer(result, as_json=True)
    commands = {str(number): shlex.join(command) for number, command in enumerate(result["commands"], start=1)}
    answer({**result, "commands": commands}, as_json=False)
    scripts = dict.fromkeys(Path(command[-2]).name for command in result["commands"]) if args.dry_run else ()
    for name in scripts:
        show(f"\n# ---- {name}\n{(Path(result['script']).parent / name).read_text(encoding='utf-8')}")
    return 0


def launch_mpi(args: Namespace) -> int:
    """`megalm launch mpi`: check, then become mpirun."""
    from megalm.config.load import load_recipe
    from megalm.launch import mpi

    command = mpi.mpirun_arguments(args.recipe, args.overrides, args.nproc, args.hosts)
    config = load_recipe(args.recipe, args.overrides)
    check_world(config, args.nproc)
    check_rules(config, check_data(config))
    if args.dry_run:
        return show(shlex.join(command))
    mpi.run(command)


def launch_status(args: Namespace) -> int:
    """`megalm launch status`: the jobs of a run."""
    from megalm.launch.jobs import status

    return answer(status(args.run), args.json)


def launch_cancel(args: Namespace) -> int:
    """`megalm launch cancel`: end the jobs of a run."""
    from megalm.launch.jobs import cancel

    return answer(cancel(args.run), args.json)


def launch_logs(args: Namespace) -> int:
    """`megalm launch logs`: where they are."""
    from megalm.launch.jobs import logs

    return answer(logs(args.run), args.json)
