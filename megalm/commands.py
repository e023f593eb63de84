"""What each command of `megalm` does with its parsed arguments; each function returns the exit status.

Owns the order of things before a run: every check of recipe, world and data comes first, then the start of
workers. Heavy modules are imported inside the functions that need them. The commands of `megalm launch` and
`megalm bench` stand in those packages.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.answers import answer, show
from megalm.errors import ConfigError, Interrupted, LaunchError
from megalm.launch.checks import check_data, check_device, check_rules, check_sinks, check_world

if TYPE_CHECKING:
    from megalm.config.model import ModelSection
    from megalm.config.run import RunConfig
    from megalm.distributed.rendezvous import Rendezvous

_LARGE_VOCABULARY = 2**17  # where neither recipe nor data tell: checkpoints are estimated rather too large


def _world(config: RunConfig, nproc: int | None) -> tuple[int, bool]:
    """Return how many ranks the run has, and whether this process is to start them.

    Under a launcher the world is the launcher's. Raises LaunchError when --nproc says something else.
    """
    return _launched_world(nproc or config.parallel.least_ranks, nproc)


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
    """Return whether the launcher starts this job again, whose command may still have `--fresh` in it."""
    launched = _launcher()
    return launched is not None and launched.attempt != "0"


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
    if args.dry_run is not None:
        return _dry_run(args)
    if args.json:
        raise ConfigError("--json belongs to --dry-run; add --dry-run RANK/WORLD or leave it out")
    from megalm.train.interruption import STOPPING, Interruption

    interruption = Interruption()  # first of all, as the imports below take seconds
    from megalm.config.load import load_recipe
    from megalm.train.run_directory import check_run, is_doomed

    config = load_recipe(args.recipe, args.overrides)
    world, starts_workers = _world(config, args.nproc)
    check_world(config, world)
    data = check_data(config)
    config = config.with_windows(len(data.windows(config.model.sequence, config.data.rows)))
    check_device(config)
    check_sinks(config)
    check_rules(config, data)
    restarted = _is_restart()
    fresh = args.fresh and (is_doomed(Path(config.run.dir)) or not restarted)
    before = check_run(config, data.fingerprint, data.tokenizer_fingerprint, fresh)
    if config.train.init_from is not None and (before is None or fresh):
        from megalm.train.start import check_start

        check_start(config, config.model.vocab or data.vocabulary, data.tokenizer() if starts_workers else None)
    if starts_workers:
        if interruption.received:  # from here on signals are passed on to the workers
            raise Interrupted(f"{signal.Signals(interruption.received).name} came before anything was started")
        command = ["train", args.recipe, *args.overrides, *(["--fresh"] if fresh else [])]
        return _start_workers(args, command, world, Path(config.run.dir) / "logs", STOPPING)
    from megalm.train.pretrain import train as pretrain

    pretrain(config, args.fresh, interruption, restarted)
    return 0


def _dry_run(args: Namespace) -> int:
    for option, is_given in (("--nproc", args.nproc is not None), ("--fresh", args.fresh)):
        if is_given:
            raise ConfigError(f"{option} starts or changes a run and --dry-run does neither; leave one of them out")
    from megalm.config.load import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    check_world(config, args.dry_run[1])
    from megalm.dry_run.command import dry_run

    return dry_run(config, args.recipe, args.dry_run, args.json)


def evaluate(args: Namespace) -> int:
    """`megalm evaluate`: the loss of a run's newest checkpoint on a split of its data."""
    from megalm.config.trained import trained_config

    config = trained_config(Path(args.run), args.overrides)
    world, starts_workers = _world(config, args.nproc)
    check_world(config, world)
    check_data(config)
    check_device(config)
    if starts_workers:
        command = ["evaluate", args.run, *args.overrides, "--split", args.split, *_weights(args)]
        return _start_workers(args, [*command, *(["--json"] if args.json else [])], world, None)
    from megalm.evaluation.command import evaluate as run

    result = run(args.run, args.overrides, args.split, args.ema, args.step)
    return 0 if result is None else answer(result, args.json)


def _weights(args: Namespace) -> list[str]:
    """Return the options that say which weights are meant."""
    return (["--ema"] if args.ema else []) + ([] if args.step is None else [f"--step={args.step}"])


def inspect(args: Namespace) -> int:
    """`megalm inspect`: what a run noted of its layers, as a picture and a table."""
    from megalm.train.layer_report import inspect_run, table

    result = inspect_run(Path(args.run))
    return answer(result, as_json=True) if args.json else show(table(result))


def generate(args: Namespace) -> int:
    """`megalm generate`: let the model of a run continue a text."""
    from megalm.config.trained import FOR_GENERATION, trained_config

    config = trained_config(Path(args.run), (*args.overrides, *FOR_GENERATION))
    world, starts_workers = _world(config, args.nproc)
    check_world(config, world)
    check_device(config)
    if starts_workers:
        command = ["generate", args.run, *args.overrides, f"--prompt={args.prompt}", f"--tokens={args.tokens}"]
        command += [f"--temperature={args.temperature}", f"--seed={args.seed}", *_weights(args)]
        command += [f"--top-k={args.top_k}"] if args.top_k is not None else []
        command += [f"--top-p={args.top_p}"] if args.top_p is not None else []
        return _start_workers(args, command, world, None)
    from megalm.generation.command import generate as run

    text = run(
        args.run, args.overrides, args.prompt,
        tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        averaged=args.ema, step=args.step,
    )  # fmt: skip
    return 0 if text is None else show(text)


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
    return answer(result, as_json=False)


def data_inspect(args: Namespace) -> int:
    """`megalm data inspect`: what prepared data holds."""
    from megalm.data.commands import inspect_command

    return answer(inspect_command(args.path), args.json)


def data_verify(args: Namespace) -> int:
    """`megalm data verify`: prepared data against its checksums."""
    from megalm.data.commands import verify_command

    return answer(verify_command(args.path), args.json)


def tokenizer_train(args: Namespace) -> int:
    """`megalm tokenizer train`: text to a tokenizer."""
    from megalm.data.commands import train_tokenizer_command

    result = train_tokenizer_command(
        args.corpus, args.files, args.vocab, args.out, args.overwrite, args.separator, args.text_field
    )
    return answer(result, as_json=False)


def tokenizer_inspect(args: Namespace) -> int:
    """`megalm tokenizer inspect`: what a tokenizer holds."""
    from megalm.data.commands import inspect_tokenizer_command

    return answer(inspect_tokenizer_command(args.path), args.json)


def config_show(args: Namespace) -> int:
    """`megalm config show`: a recipe with its size; or its masks, formats or pipeline; or what DeepSpeed gets."""
    from megalm.config.deepspeed import deepspeed_config
    from megalm.config.load import dump_yaml, load_recipe
    from megalm.config.masks import draw_masks
    from megalm.config.storage import storage_table
    from megalm.pipeline_parallel.drawing import draw_pipeline

    config = load_recipe(args.recipe, args.overrides)
    joined = deepspeed_config(config)
    if args.mask:
        return show(draw_masks(config.model))
    if args.storage:
        return show(storage_table(config))
    if args.pipeline:
        return show(draw_pipeline(config))
    if args.deepspeed or args.json:
        return show(json.dumps(joined if args.deepspeed else config.model_dump(mode="json"), indent=2))
    lines = [_size(config.model), *([_muons(config)] if config.optim.kind == "muon" else [])]
    return show("\n".join([*(f"# {line}" for line in lines), dump_yaml(config).rstrip()]))


def _size(model: ModelSection) -> str:
    """Return the number of parameters in words; where the tokenizer gives the vocabulary, by the token of it."""
    from megalm.train.monitor import count_parameters

    if model.vocab is not None:
        count = count_parameters(model, model.vocab)
        used = f", of which a token uses {count.active:,}" if count.idle else ""
        return f"{count.total:,} parameters{used}"
    without, one = (count_parameters(model, vocab).total for vocab in (0, 1))
    return f"{without:,} parameters, and {one - without:,} for each token of the tokenizer's vocabulary"


def _muons(config: RunConfig) -> str:
    """Return which parameters Muon updates, in words."""
    from megalm.config.storage import muon_parameters

    frozen = " that is not frozen" if any(rule.freeze for rule in config.optim.rules) else ""
    return f"Muon updates {muon_parameters(config):,} parameters, of hidden matrices; AdamW everything else{frozen}"


def config_list(args: Namespace) -> int:
    """`megalm config list`: the recipes and DeepSpeed files that ship, and when to take each."""
    from megalm.config.deepspeed_files import about_configs
    from megalm.config.load import shipped_recipes

    recipes = {name: _about(path) for name, path in shipped_recipes().items()}
    configs = about_configs()
    if args.json:
        return answer({"recipes": recipes, "deepspeed_configs": configs}, as_json=True)
    width = max(map(len, [*recipes, *configs]))
    lines = ["recipes:", *(f"  {name:<{width}}  {about}" for name, about in recipes.items())]
    lines += ["zero.config:", *(f"  {name:<{width}}  {about}" for name, about in configs.items())]
    return show("\n".join(lines))


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

    return answer(inspect(Path(args.path)), args.json)


def checkpoint_verify(args: Namespace) -> int:
    """`megalm checkpoint verify`: checkpoints against their checksums."""
    from megalm.checkpoint.commands import verify

    return answer(verify(Path(args.path)), args.json)


def checkpoint_diff(args: Namespace) -> int:
    """`megalm checkpoint diff`: what differs between two checkpoints; 1 if anything but their configs does."""
    from megalm.checkpoint.commands import diff

    result = diff(Path(args.first), Path(args.second))
    answer(result, args.json)
    return 0 if result["equal"] else 1


def checkpoint_reshard(args: Namespace) -> int:
    """`megalm checkpoint reshard`: a checkpoint as another layout would have written it."""
    from megalm.dry_run.reshard import reshard

    return answer(reshard(Path(args.source), Path(args.out), args.overrides, args.ranks), args.json)


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
        return _directory(args.run_dir or ".", "--run-dir"), 2**30, 1
    from megalm.config.load import load_recipe
    from megalm.preflight.storage import checkpoint_bytes
    from megalm.train.monitor import count_parameters

    config = load_recipe(args.recipe, args.overrides)
    parameters = count_parameters(config.model, config.model.vocab or _LARGE_VOCABULARY).total
    ranks = config.parallel.least_ranks
    needed = max(2**20, 2 * checkpoint_bytes(config, parameters))
    run_dir = _directory(args.run_dir, "--run-dir") if args.run_dir else _directory(config.run.dir, "run.dir")
    return run_dir, needed, ranks


def _directory(path: str, option: str) -> Path:
    """Return the path of a directory, or of one that is not there yet. Raises ConfigError for a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"{option}={path} is a file; name a directory")
    return Path(path)
