"""What each command of `megalm` does with its parsed arguments; each function returns the exit status.

Owns the order of things before a run: every check of recipe, world and data comes first, then the start of
workers. Heavy modules are imported inside the functions that need them.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.errors import ConfigError, Interrupted, LaunchError

if TYPE_CHECKING:
    from megalm.config.run import RunConfig
    from megalm.data.datasets import PreparedData
    from megalm.distributed.rendezvous import Rendezvous

_LARGE_VOCABULARY = 2**17  # where neither recipe nor data tell: checkpoints are estimated rather too large


def _print(text: str) -> int:
    print(text)
    return 0


def _answer(result: dict[str, Any], as_json: bool) -> int:
    """Print a result as JSON, or one `key  value` a line with nested keys dotted."""
    if as_json:
        return _print(json.dumps(result, indent=2, ensure_ascii=False))
    rows = list(_rows("", result))
    width = max(len(key) for key, _ in rows)
    return _print("\n".join(f"{key:<{width}}  {value}" for key, value in rows))


def _rows(prefix: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in result.items():
        if isinstance(value, dict) and value:
            rows += _rows(f"{prefix}{key}.", value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                rows += _rows(f"{prefix}{key}.{index}.", item)
        elif isinstance(value, list):
            rows.append((prefix + key, ", ".join(json.dumps(item, ensure_ascii=False) for item in value)))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((prefix + key, f"{value:,}"))
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _world(config: RunConfig, nproc: int | None) -> tuple[int, bool]:
    """Return how many ranks the run has, and whether this process is to start them.

    Under a launcher the world is the launcher's. Raises LaunchError when --nproc says something else.
    """
    return _launched_world(nproc or config.parallel.tensor * config.parallel.pipeline, nproc)


def _launched_world(world: int, nproc: int | None) -> tuple[int, bool]:
    """Return the ranks of the launcher's world, else `world`, and whether this process is to start them."""
    launched = _launcher()
    if launched is None:
        return world, world > 1
    if nproc not in (None, launched.world_size):
        raise LaunchError(
            f"--nproc={nproc} contradicts the {launched.world_size} ranks of {launched.launcher}; leave --nproc out"
        )
    return launched.world_size, False


def _launcher() -> Rendezvous | None:
    """Return what a launcher says of this process. Nobody meets yet: a process can start MPI only once."""
    from megalm.distributed.rendezvous import read_environment

    return read_environment(os.environ, lambda rank, world_size: ("127.0.0.1", 1))


def _is_restart() -> bool:
    """Return whether the launcher starts this job again: then `--fresh`, still in its command, was done already."""
    launched = _launcher()
    return launched is not None and launched.attempt != "0"


def _check_world(config: RunConfig, world: int) -> int:
    """Return the data-parallel ranks in `world`, with the DeepSpeed JSON checked as well."""
    from megalm.config.checks import check_world
    from megalm.config.deepspeed import deepspeed_config

    data_size = check_world(config, world)
    deepspeed_config(config, data_size)
    return data_size


def _check_device(config: RunConfig) -> None:
    """Raise ConfigError for a device that this machine lacks, or kernels that need one. torch is asked only then."""
    if config.run.device == "cuda" or config.model.kernels == "fused":
        from megalm.distributed.world import check_device

        check_device(config)


def _check_data(config: RunConfig) -> PreparedData:
    """Return the prepared data. Raises DataError or ConfigError unless it is whole and fits the recipe."""
    from megalm.data.datasets import open_prepared

    path = config.data.path
    data = open_prepared(path)
    vocab = config.model.vocab
    if vocab is not None and vocab < data.vocabulary:
        raise ConfigError(
            f"model.vocab={vocab} is smaller than the {data.vocabulary} tokens of the tokenizer in {path}; "
            f"use {data.vocabulary} or more, or leave model.vocab out"
        )
    sequence, tokens = config.model.sequence, len(data.train)
    if tokens <= sequence:
        raise ConfigError(
            f"model.sequence={sequence} is not shorter than the {tokens} training tokens in {path}; "
            "use a smaller model.sequence or more text"
        )
    return data


def _start_workers(
    args: Namespace,
    command: Sequence[str],
    world: int,
    log_dir: Path | None,
    held: Sequence[signal.Signals] = (),
) -> int:
    """Start the command `world` times on this machine, wait, and return its exit status."""
    from megalm.launch.local import run_workers

    debug = ["--debug"] if args.debug else []
    return run_workers([sys.executable, "-m", "megalm", *command, *debug], world, log_dir, held)


def train(args: Namespace) -> int:
    """`megalm train`: check everything, then train here or in workers of this machine."""
    from megalm.train.interruption import STOPPING, Interruption

    interruption = Interruption()  # first of all, as the imports below take seconds
    from megalm.config.load import load_recipe
    from megalm.train.run_directory import check_run

    config = load_recipe(args.recipe, args.overrides)
    world, starts_workers = _world(config, args.nproc)
    _check_world(config, world)
    data = _check_data(config)
    _check_device(config)
    restarted = _is_restart()
    fresh = args.fresh and not restarted
    check_run(config, data.fingerprint, data.tokenizer_fingerprint, fresh)
    if starts_workers:
        if interruption.received:  # from here on signals are passed on to the workers
            raise Interrupted(f"{signal.Signals(interruption.received).name} came before anything was started")
        command = ["train", args.recipe, *args.overrides, *(["--fresh"] if fresh else [])]
        return _start_workers(args, command, world, Path(config.run.dir) / "logs", STOPPING)
    from megalm.train.pretrain import train as pretrain

    pretrain(config, fresh, interruption, restarted)
    return 0


def evaluate(args: Namespace) -> int:
    """`megalm evaluate`: the loss of a run's newest checkpoint on a split of its data."""
    from megalm.config.trained import trained_config

    config = trained_config(Path(args.run), args.overrides)
    world, starts_workers = _world(config, args.nproc)
    _check_world(config, world)
    _check_data(config)
    if starts_workers:
        command = ["evaluate", args.run, *args.overrides, "--split", args.split]
        return _start_workers(args, [*command, *(["--json"] if args.json else [])], world, None)
    from megalm.evaluation.command import evaluate as run

    result = run(args.run, args.overrides, args.split)
    return 0 if result is None else _answer(result, args.json)


def generate(args: Namespace) -> int:
    """`megalm generate`: let the model of a run continue a text."""
    from megalm.config.trained import trained_config

    config = trained_config(Path(args.run), args.overrides)
    world, starts_workers = _world(config, args.nproc)
    _check_world(config, world)
    if starts_workers:
        command = ["generate", args.run, *args.overrides, f"--prompt={args.prompt}", f"--tokens={args.tokens}"]
        command += [f"--temperature={args.temperature}", f"--seed={args.seed}"]
        command += [f"--top-k={args.top_k}"] if args.top_k is not None else []
        command += [f"--top-p={args.top_p}"] if args.top_p is not None else []
        return _start_workers(args, command, world, None)
    from megalm.generation.command import generate as run

    text = run(
        args.run, args.overrides, args.prompt,
        tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    return 0 if text is None else _print(text)


def launch_slurm(args: Namespace) -> int:
    """`megalm launch slurm`: check the recipe and its data against the world that is asked for, then submit."""
    from megalm.config.load import load_recipe
    from megalm.launch import records, slurm
    from megalm.train.run_directory import check_run

    names = ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition", "account", "qos", "container", "exclude")
    request = slurm.JobRequest(**{name: getattr(args, name) for name in names}, chain=args.chain)
    request.check()
    request = slurm.with_defaults(request, records.script_folder() / slurm.SCRIPT)
    config = load_recipe(args.recipe, args.overrides)
    slurm.run_directory(config)
    _check_world(config, slurm.world_size(request))
    data = _check_data(config)
    check_run(config, data.fingerprint, data.tokenizer_fingerprint)
    result = slurm.launch(config, request, args.dry_run)
    return _answer(result if args.json else {**result, "command": shlex.join(result["command"])}, args.json)


def launch_mpi(args: Namespace) -> int:
    """`megalm launch mpi`: check, then become mpirun."""
    from megalm.config.load import load_recipe
    from megalm.launch import mpi

    command = mpi.mpirun_arguments(args.recipe, args.overrides, args.nproc, args.hosts)
    config = load_recipe(args.recipe, args.overrides)
    _check_world(config, args.nproc)
    _check_data(config)
    if args.dry_run:
        return _print(shlex.join(command))
    mpi.run(command)


def launch_status(args: Namespace) -> int:
    """`megalm launch status`: the jobs of a run."""
    from megalm.launch.jobs import status

    return _answer(status(args.run), args.json)


def launch_cancel(args: Namespace) -> int:
    """`megalm launch cancel`: end the jobs of a run."""
    from megalm.launch.jobs import cancel

    return _answer(cancel(args.run), args.json)


def launch_logs(args: Namespace) -> int:
    """`megalm launch logs`: where they are."""
    from megalm.launch.jobs import logs

    return _answer(logs(args.run), args.json)


def quickstart(args: Namespace) -> int:
    """`megalm quickstart`: from text to a sample of a trained model."""
    from megalm.quickstart import run

    return run(args.out, args.overrides, args.fresh)


def data_prepare(args: Namespace) -> int:
    """`megalm data prepare`: text to tokens."""
    from megalm.data.commands import prepare_command

    result = prepare_command(
        args.corpus, args.files, args.vocab, args.out, args.tokenizer,
        args.held_out, args.seed, args.overwrite, args.separator, args.text_field,
    )  # fmt: skip
    return _answer(result, as_json=False)


def data_inspect(args: Namespace) -> int:
    """`megalm data inspect`: what prepared data holds."""
    from megalm.data.commands import inspect_command

    return _answer(inspect_command(args.path), args.json)


def data_verify(args: Namespace) -> int:
    """`megalm data verify`: prepared data against its checksums."""
    from megalm.data.commands import verify_command

    return _answer(verify_command(args.path), args.json)


def tokenizer_train(args: Namespace) -> int:
    """`megalm tokenizer train`: text to a tokenizer."""
    from megalm.data.commands import train_tokenizer_command

    result = train_tokenizer_command(
        args.corpus, args.files, args.vocab, args.out, args.overwrite, args.separator, args.text_field
    )
    return _answer(result, as_json=False)


def tokenizer_inspect(args: Namespace) -> int:
    """`megalm tokenizer inspect`: what a tokenizer holds."""
    from megalm.data.commands import inspect_tokenizer_command

    return _answer(inspect_tokenizer_command(args.path), args.json)


def config_show(args: Namespace) -> int:
    """`megalm config show`: a recipe, resolved; or the dict that DeepSpeed gets."""
    from megalm.config.deepspeed import deepspeed_config
    from megalm.config.load import dump_yaml, load_recipe

    config = load_recipe(args.recipe, args.overrides)
    joined = deepspeed_config(config)
    if args.deepspeed or args.json:
        return _print(json.dumps(joined if args.deepspeed else config.model_dump(mode="json"), indent=2))
    return _print(dump_yaml(config).rstrip())


def config_list(args: Namespace) -> int:
    """`megalm config list`: the recipes and DeepSpeed files that ship, each recipe with its first words."""
    from megalm.config.deepspeed import shipped_configs
    from megalm.config.load import shipped_recipes

    recipes = {name: _about(path) for name, path in shipped_recipes().items()}
    configs = list(shipped_configs())
    if args.json:
        return _answer({"recipes": recipes, "deepspeed_configs": configs}, as_json=True)
    width = max(len(name) for name in recipes)
    lines = [f"  {name:<{width}}  {about}" for name, about in recipes.items()]
    return _print("\n".join(["recipes:", *lines, "zero.config:", f"  {', '.join(configs)}"]))


def _about(recipe: Path) -> str:
    """Return the first sentence of a recipe's comment."""
    words = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# "))
    return " ".join(words).split(". ")[0].rstrip(".")


def checkpoint_inspect(args: Namespace) -> int:
    """`megalm checkpoint inspect`: what a checkpoint holds."""
    from megalm.checkpoint.commands import inspect

    return _answer(inspect(Path(args.path)), args.json)


def checkpoint_verify(args: Namespace) -> int:
    """`megalm checkpoint verify`: checkpoints against their checksums."""
    from megalm.checkpoint.commands import verify

    return _answer(verify(Path(args.path)), args.json)


def doctor(args: Namespace) -> int:
    """`megalm doctor`: this machine, or with --cluster every node of a launched world; 1 if something fails."""
    run_dir, needed_bytes, local_ranks = _doctor_place(args)
    if not args.cluster:
        for option, value in (("--nproc", args.nproc), ("--exclude-file", args.exclude_file)):
            if value is not None:
                raise ConfigError(f"{option} belongs to `megalm doctor --cluster`; add --cluster or leave it out")
        from megalm.preflight.command import examine_machine

        return examine_machine(run_dir, needed_bytes, local_ranks, args.json)
    world, starts_workers = _launched_world(args.nproc or 1, args.nproc)
    if starts_workers:
        command = ["doctor", "--cluster", *([args.recipe] if args.recipe else []), *args.overrides]
        command += [f"--run-dir={run_dir}", f"--start-timeout={args.start_timeout}"]
        command += [f"--exclude-file={args.exclude_file}"] if args.exclude_file else []
        return _start_workers(args, [*command, *(["--json"] if args.json else [])], world, None)
    from megalm.preflight.command import examine_cluster

    exclude_file = Path(args.exclude_file) if args.exclude_file else None
    return examine_cluster(run_dir, needed_bytes, exclude_file, args.start_timeout, args.json)


def _doctor_place(args: Namespace) -> tuple[Path, int, int]:
    """Return the directory to look at, the bytes that must be free there, and the ranks that this machine will run."""
    if args.recipe is None or "=" in args.recipe:
        if args.recipe is not None:
            raise ConfigError(f"{args.recipe} changes no recipe; give a RECIPE first, or --run-dir=DIR")
        return Path(args.run_dir or "."), 2**30, 1
    from megalm.config.load import load_recipe
    from megalm.preflight.storage import checkpoint_bytes
    from megalm.train.monitor import count_parameters

    config = load_recipe(args.recipe, args.overrides)
    parameters = count_parameters(config.model, config.model.vocab or _LARGE_VOCABULARY).total
    ranks = config.parallel.tensor * config.parallel.pipeline
    needed = max(2**20, 2 * checkpoint_bytes(config, parameters))
    return Path(args.run_dir or config.run.dir), needed, ranks
