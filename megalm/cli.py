"""The command line: arguments in, an exit status out.

0: done; 1: failed; 2: the user's input is wrong; 75: saved because a signal asked to stop; 130: interrupted by hand
where there was nothing to save.

Owns the arguments and how errors are shown. What each command does is left to `commands` and its like in `launch`
and `bench`, which are imported only once a command is to be run, so that `megalm --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from megalm.arguments import Commands, Parser, UsageError, fraction, number, numbers, place
from megalm.config.choices import CHOICES
from megalm.errors import Interrupted, MegalmError, UserError
from megalm.registry import nearest
from megalm.version import __version__

INTERRUPTED = 130
_SCRIPT = "default: the script's #SBATCH line"
OVERRIDES = "key=value pairs that change the recipe, such as model.layers=4 parallel.tensor=2"


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    shared = Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback of errors")
    parser = Parser(
        prog="megalm",
        description="Train large Transformer language models: tensor, pipeline and data parallel, ZeRO.",
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"megalm {__version__}")
    parser.set_defaults(function=None, parser=parser)
    commands = Commands(parser, shared, "commands")
    _add_run_commands(commands)
    _add_data_commands(commands)
    _add_look_commands(commands)
    _add_foreign_commands(commands)
    _add_doctor_command(commands)
    _add_launch_commands(commands)
    _add_bench_commands(commands)
    return parser


def _add_run_commands(commands: Commands) -> None:
    quickstart = commands.add(
        "quickstart", "quickstart", "text, tokenizer, training, evaluation and a sample in one go"
    )
    quickstart.add_argument("--out", default="runs/quickstart", metavar="DIR", help="where everything is written")
    quickstart.add_argument("--fresh", action="store_true", help="remove an earlier quick start in DIR first")
    quickstart.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)

    train = commands.add("train", "train", "train the model of a recipe, or go on from its last checkpoint")
    train.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    train.add_argument("--fresh", action="store_true", help="remove the run in run.dir and begin anew")
    _add_dry_run(train)

    evaluate = commands.add("evaluate", "evaluate", "perplexity and bits per byte of a run on held-out text")
    evaluate.add_argument("run", metavar="RUN", help="a run's directory")
    evaluate.add_argument("--split", choices=["validation", "train"], default="validation", help="default: %(default)s")
    evaluate.add_argument("--json", action="store_true", help="write the result as JSON")

    generate = commands.add("generate", "generate", "let the model of a run continue a text")
    generate.add_argument("run", metavar="RUN", help="a run's directory")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    generate.add_argument(
        "--tokens", type=number(1), default=100, metavar="N", help="new tokens (default: %(default)s)"
    )
    generate.add_argument("--temperature", type=fraction, default=1.0, metavar="X", help="0 is greedy (default: 1)")
    generate.add_argument("--top-k", type=number(1), metavar="N", help="draw from the N likeliest tokens only")
    generate.add_argument("--top-p", type=fraction, metavar="X", help="draw from the likeliest of probability X only")
    generate.add_argument("--seed", type=number(0), default=0, metavar="N", help="of the draws (default: %(default)s)")

    _add_exchange_commands(commands)

    inspect = commands.add("inspect", "inspect", "draw what a run noted of its layers (inspect.every)")
    inspect.add_argument("run", metavar="RUN", help="a run's directory")
    inspect.add_argument("--json", action="store_true", help="write the result as JSON")

    for parser in (evaluate, generate):
        _add_weights(parser)
    for parser in (train, evaluate, generate):
        parser.add_argument("--nproc", type=number(1), metavar="N", help="processes (default: as few as it needs)")
        parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)


def _add_weights(parser: Parser) -> None:
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema_decay)")
    parser.add_argument("--step", type=number(0), metavar="N", help="of that checkpoint (default: the newest)")


def _add_exchange_commands(commands: Commands) -> None:
    incoming = commands.add(
        "import-hf", "models.huggingface.commands.import_hf", "make a run of a model of Hugging Face transformers"
    )
    incoming.add_argument("directory", metavar="DIR", help="with config.json, *.safetensors, tokenizer.json")
    incoming.add_argument("--out", required=True, metavar="RUN", help="the run's directory to make")
    incoming.add_argument(
        "--precision", choices=CHOICES["precision"], help="of the recipe (default: that of the files)"
    )
    outgoing = commands.add(
        "export-hf", "models.huggingface.commands.export_hf", "write a run's model for transformers, and check it"
    )
    outgoing.add_argument("run", metavar="RUN", help="a run's directory")
    outgoing.add_argument("--out", required=True, metavar="DIR", help="the directory to make")
    _add_weights(outgoing)
    outgoing.add_argument("--dtype", choices=CHOICES["precision"], help="of the files (default: the run's precision)")
    outgoing.add_argument("--family", metavar="NAME", help="a model_type (default: the first that has the model)")
    for parser in (incoming, outgoing):
        parser.add_argument("--json", action="store_true", help="write the result as JSON")


def _add_dry_run(parser: Parser) -> None:
    parser.add_argument(
        "--dry-run", type=place, metavar="RANK/WORLD", help="print what one rank is, holds and sends; train nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: write all of it as JSON")


def _add_doctor_command(commands: Commands) -> None:
    doctor = commands.add("doctor", "doctor", "look for what would stop or slow down training, and say what heals it")
    doctor.add_argument("recipe", nargs="?", metavar="RECIPE", help="its run.dir and the size of its checkpoints count")
    doctor.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    doctor.add_argument("--run-dir", metavar="DIR", help="where the disk is looked at (default: the recipe's, or .)")
    doctor.add_argument("--json", action="store_true", help="write the result as JSON")
    doctor.add_argument(
        "--cluster", action="store_true", help="compare all nodes of the world that srun, mpirun or torchrun started"
    )
    doctor.add_argument("--nproc", type=number(1), metavar="N", help="with --cluster: start N processes here")
    doctor.add_argument("--exclude-file", metavar="FILE", help="with --cluster: write failed nodes there, one a line")
    doctor.add_argument(
        "--start-timeout", type=number(1), default=60, metavar="S", help="wait for ranks (default: %(default)s s)"
    )


def _add_data_commands(commands: Commands) -> None:
    data = commands.group("data", "make text into tokens, and look at them")
    prepare = data.add("prepare", "data_prepare", "make a directory of tokens from text")
    tokenizer = commands.group("tokenizer", "make and look at tokenizers")
    learn = tokenizer.add("train", "tokenizer_train", "learn a tokenizer from text")
    for parser in (prepare, learn):
        parser.add_argument("files", nargs="*", default=[], metavar="FILE", help=".txt, .jsonl, .gz, or directories")
        parser.add_argument("--corpus", metavar="NAME", help="text that Python brings: builtin or topics")
        parser.add_argument("--vocab", type=number(1), metavar="N", help="tokens to learn (default: 2048)")
        parser.add_argument("--out", required=True, metavar="DIR", help="the directory to make")
        parser.add_argument("--overwrite", action="store_true", help="replace what is there")
        parser.add_argument("--separator", metavar="LINE", help="line between the documents of a .txt (empty: blank)")
        parser.add_argument("--text-field", metavar="NAME", help="a .jsonl's text (default: text)")
    prepare.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json to use instead of learning one")
    prepare.add_argument("--held-out", type=fraction, default=0.05, metavar="X", help="share (default: %(default)s)")
    prepare.add_argument(
        "--seed", type=number(0), default=1234, metavar="N", help="of the split (default: %(default)s)"
    )

    _add_look(data, "inspect", "data_inspect", "show what a directory of tokens holds")
    _add_look(data, "verify", "data_verify", "compare a directory of tokens with its checksums")
    _add_look(tokenizer, "inspect", "tokenizer_inspect", "show what a tokenizer holds")


def _add_look_commands(commands: Commands) -> None:
    config = commands.group("config", "look at recipes")
    show = config.add("show", "config_show", "print a recipe with everything that it inherits and by default is")
    show.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    show.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    what = show.add_mutually_exclusive_group()
    what.add_argument("--deepspeed", action="store_true", help="print what DeepSpeed is started with instead")
    what.add_argument("--mask", action="store_true", help="draw which keys the queries of each layer see instead")
    what.add_argument("--pipeline", action="store_true", help="draw which stage does what when instead")
    what.add_argument("--storage", action="store_true", help="print what is kept in which number format instead")
    what.add_argument("--json", action="store_true", help="write the result as JSON")
    listing = config.add("list", "config_list", "list the recipes and DeepSpeed files that come with megalm")
    listing.add_argument("--json", action="store_true", help="write the result as JSON")

    checkpoint = commands.group("checkpoint", "look at checkpoints")
    _add_look(checkpoint, "inspect", "checkpoint_inspect", "show what a run's newest checkpoint, or one, holds")
    _add_look(checkpoint, "verify", "checkpoint_verify", "compare the checkpoints of a run with their checksums")
    diff = checkpoint.add("diff", "checkpoint_diff", "compare two checkpoints of any layouts; 1 if they differ")
    for name in ("first", "second"):
        diff.add_argument(name, metavar=name.upper(), help="a run's directory, whose newest counts, or a checkpoint's")
    reshard = checkpoint.add(
        "reshard", "checkpoint_reshard", "write a checkpoint as another layout would have; to go on needs no reshard"
    )
    reshard.add_argument("source", metavar="PATH", help="a run's directory, whose newest counts, or a checkpoint's")
    reshard.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of parallel.*, zero.* and the batch"
    )
    reshard.add_argument("--out", required=True, metavar="DIR", help="a new run's directory")
    reshard.add_argument("--ranks", type=number(1), metavar="N", help="of that run (default: as few as it needs)")
    for parser in (diff, reshard):
        parser.add_argument("--json", action="store_true", help="write the result as JSON")


def _add_foreign_commands(commands: Commands) -> None:
    for name, text in (
        ("megatron", "make a run of a checkpoint of Megatron-LM"),
        ("deepspeed", "make a run of a DeepSpeed universal checkpoint of Megatron-DeepSpeed"),
    ):
        parser = commands.add(f"import-{name}", f"models.foreign.command.import_{name}", text)
        parser.add_argument("directory", metavar="DIR", help="where it was saved, or one checkpoint in there")
        parser.add_argument("--out", required=True, metavar="RUN", help="the run's directory to make")
        parser.add_argument("--trust", action="store_true", help="its files are pickles and you know who made them")
        parser.add_argument("--tokenizer", metavar="FILE", help="the model's tokenizer.json, for the run")
        parser.add_argument("--vocab", type=number(1), metavar="N", help="leave out rows of padding beyond N tokens")
        parser.add_argument("--json", action="store_true", help="write the result as JSON")


def _add_launch_commands(commands: Commands) -> None:
    group = commands.group("launch", "start a training run somewhere, and look after it")
    local = group.add("local", "train", "start workers on this machine: the same as megalm train")
    slurm = group.add(
        "slurm", "launch.commands.launch_slurm", "submit a batch job that saves, requeues and resumes by itself"
    )
    mpi = group.add("mpi", "launch.commands.launch_mpi", "start ranks by mpirun")
    for parser in (local, slurm, mpi):
        parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
        parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    local.add_argument("--nproc", type=number(1), metavar="N", help="processes (default: as few as it needs)")
    local.add_argument("--fresh", action="store_true", help="remove the run in run.dir and begin anew")
    _add_dry_run(local)
    mpi.add_argument("--nproc", type=number(1), required=True, metavar="N", help="ranks")
    mpi.add_argument("--hosts", metavar="HOST[:N],...", help="where they run (default: as mpirun decides)")
    mpi.add_argument("--dry-run", action="store_true", help="print the command only")

    slurm.add_argument("--nodes", type=number(1), metavar="N", help=f"nodes ({_SCRIPT})")
    _add_slurm_options(slurm)
    slurm.add_argument("--chain", type=number(1), default=1, metavar="K", help="jobs, each goes on from the last")
    slurm.add_argument("--preflight", action="store_true", help="examine nodes first, stay away from those that fail")
    slurm.add_argument("--container", metavar="IMAGE", help="a container image (needs the pyxis plug-in)")
    slurm.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    slurm.add_argument("--json", action="store_true", help="write the result as JSON")
    for name, text in (
        ("status", "the jobs of a run and how far it is"),
        ("cancel", "cancel the jobs of a run"),
        ("logs", "the logs of a run's newest job, and the first error in them"),
    ):
        look = group.add(name, f"launch.commands.launch_{name}", text)
        look.add_argument("run", metavar="RUN", help="a run's directory")
        look.add_argument("--json", action="store_true", help="write the result as JSON")


def _add_slurm_options(parser: Parser) -> None:
    parser.add_argument("--gpus-per-node", type=number(1), metavar="N", help=f"GPUs, and ranks, a node ({_SCRIPT})")
    parser.add_argument("--cpus-per-task", type=number(1), metavar="N", help=f"cores a rank ({_SCRIPT})")
    parser.add_argument("--time", metavar="TIME", help=f"minutes, HH:MM:SS or D-HH:MM:SS ({_SCRIPT})")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", metavar="NAME", help="as sbatch knows it")
    parser.add_argument("--exclude", metavar="NODES", help="nodes to stay away from, such as node[3,7]")


def _add_bench_commands(commands: Commands) -> None:
    group = commands.group("bench", "measure how training scales")
    scaling = group.add("scaling", "bench.commands.bench_scaling", "some steps of a recipe on each number of ranks")
    scaling.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    scaling.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    sizes = scaling.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--nproc", type=numbers, metavar="N,...", help="processes on this machine, one after the other")
    sizes.add_argument("--nodes", type=numbers, metavar="N,...", help="nodes: a Slurm job each, one after the other")
    mode = scaling.add_mutually_exclusive_group()
    for name, what in (("strong", "stays (default)"), ("weak", "is the smallest point's, and grows with the ranks")):
        text = f"the recipe's global batch {what}"
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, default="strong", help=text)
    scaling.add_argument("--steps", type=number(5), default=50, metavar="N", help="a point (default: %(default)s)")
    scaling.add_argument("--out", default="runs/scaling", metavar="DIR", help="for everything (default: %(default)s)")
    scaling.add_argument("--fresh", action="store_true", help="remove an earlier scaling run in DIR first")
    _add_slurm_options(scaling)
    scaling.add_argument("--dry-run", action="store_true", help="check and print, start nothing")
    collect = group.add("collect", "bench.commands.bench_collect", "figures, table and picture of a scaling run so far")
    collect.add_argument("out", metavar="DIR", help="the --out of a scaling run")
    for parser in (scaling, collect):
        parser.add_argument("--json", action="store_true", help="write the result as JSON")


def _add_look(group: Commands, name: str, function: str, text: str) -> None:
    """Add a command that takes a path and can answer in JSON."""
    parser = group.add(name, function, text)
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="write the result as JSON")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises UsageError; `--help` and `--version` print and exit with 0."""
    parser = build_parser()
    # Of `RECIPE --nproc 2 a=1` argparse leaves a=1 over, so overrides are taken from there as well.
    parsed, left = parser.parse_known_args(arguments, argparse.Namespace(debug=False))
    options = [word for word in left if word.startswith("-")]
    if options:
        guess = nearest(options[0].split("=")[0], parser.option_names())
        hint = f"did you mean {guess}?" if guess else f"see {parsed.parser.prog} --help"
        raise UsageError(f"{parsed.parser.prog}: unknown option {options[0]}; {hint}")
    if left and not hasattr(parsed, "overrides"):
        raise UsageError(f"{parsed.parser.prog}: {left[0]!r} is one argument too many; see {parsed.parser.prog} --help")
    if left:
        parsed.overrides = [*parsed.overrides, *left]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (None: this process's own) and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    with contextlib.suppress(OSError, ValueError):  # where there is no standard error, or no such signal
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # at any time: who hangs shows where
    try:
        parsed = parse(arguments)
        if parsed.function is None:
            parsed.parser.print_help(sys.stderr)
            return UserError.exit_status
        module, _, function = parsed.function.rpartition(".")
        status: int = getattr(importlib.import_module(f"megalm.{module or 'commands'}"), function)(parsed)
        sys.stdout.flush()
        return status
    except Interrupted as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.exit_status
    except MegalmError as error:
        return _fail(str(error), error.exit_status, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader has seen enough, as in `megalm config list | head -1`; the flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        remedy = "" if debug else "; --debug shows where"
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())}{remedy}", MegalmError.exit_status, debug)


def _fail(message: str, status: int, debug: bool) -> int:
    """Write the message to stderr, then the traceback if it is wanted, and return the status."""
    print(f"error: {message}", file=sys.stderr)
    if debug:
        traceback.print_exc()
    return status
