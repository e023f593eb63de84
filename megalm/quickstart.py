"""`megalm quickstart`: real text to a trained, measured and speaking model in a few minutes on two cores.

Owns the order of the phases and what is told about them; each phase is the command that a user would type.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.data.corpus import CORPORA
from megalm.data.datasets import PreparedData, open_prepared, prepare
from megalm.errors import ConfigError, Interrupted, MegalmError, UserError
from megalm.launch.local import run_workers
from megalm.train.run_directory import check_place

RECIPE = "gpt-tiny"
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2", "zero.stage=1")
CORPUS = "builtin"
VOCABULARY = 2048
PROMPT = "The with statement is used to"
SAMPLE_TOKENS = 80
PHASES = 5
PICTURE = "loss.png"


def run(out: str | Path, overrides: Sequence[str] = (), fresh: bool = False) -> int:
    """Prepare text, train, evaluate, draw the losses and write a sample, with the run in `out`; return 0.

    Each phase tells about itself on stdout. Data that is there is used again; a run that is there goes on, or
    is removed first with `fresh`. Raises UserError for wrong overrides before anything is done, MegalmError
    when training fails or the model does not beat a bigram model with add-one smoothing.
    """
    directory = Path(out)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out {out}: is no directory; choose another place")
    check_place(directory)
    settings = (*LAYOUT, *_fitting_this_machine(overrides), *overrides, f"run.dir={directory}")
    config = load_recipe(RECIPE, settings)
    begin = time.monotonic()
    with _phase(1, "text -> tokenizer -> tokens"):
        data = _prepared(Path(config.data.path))
    with _phase(2, f"training on {_processes(config)} processes"):
        _train(config, settings, fresh)
    with _phase(3, "held-out perplexity, in one process, from the checkpoint"):
        perplexities = _evaluate(directory, data, config)
    with _phase(4, "a picture of the losses"):
        _draw(config, perplexities)
    with _phase(5, "a sample"):
        _sample(directory)
    _tell_where(directory, config, time.monotonic() - begin)
    if not perplexities.model < perplexities.add_one_bigram:
        raise MegalmError(
            f"held-out perplexity {perplexities.model:.1f} is not below the add-one bigram's "
            f"{perplexities.add_one_bigram:.1f}; look at {directory / PICTURE} and train for more steps"
        )
    return 0


@dataclass(frozen=True)
class Perplexities:
    """Of the same held-out tokens."""

    model: float
    add_one_bigram: float
    interpolated_bigram: float


@contextmanager
def _phase(number: int, title: str) -> Iterator[None]:
    _say(f"\n[{number}/{PHASES}] {title}")
    begin = time.monotonic()
    yield
    _say(f"      ({time.monotonic() - begin:.1f} s)")


def _say(line: str) -> None:
    print(line, flush=True)


def _fitting_this_machine(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return settings for a machine with fewer cores or GPUs than ranks; what is learned is the same.

    Fewer cores: one large microbatch, for then stages cannot overlap anyway. Fewer GPUs, but some: the CPU.
    """
    import torch

    config = load_recipe(RECIPE, (*LAYOUT, *overrides))
    ranks = _processes(config)
    settings: list[str] = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < ranks and config.batch_ramp.start is None:
        settings.append(f"train.micro_batch={config.train.global_batch}")
        _say(f"{cores} cores for {ranks} ranks: one microbatch a step, the pipeline's stages take turns")
    if 0 < torch.cuda.device_count() < ranks:
        settings.append("run.device=cpu")
    return tuple(settings)


def _processes(config: RunConfig) -> int:
    return config.parallel.least_ranks


def _prepared(data: Path) -> PreparedData:
    if (data / "data.json").exists():
        prepared = open_prepared(data)
        _say(f"      {data} is there already and is used again")
    else:
        prepared = prepare(CORPORA.get(CORPUS)(), data, vocabulary=VOCABULARY)
    about = prepared.description
    train, held_out = about.train, about.validation
    _say(f"      {about.corpus}")
    _say(f"      learn from: {train.documents} documents, {train.bytes / 1e6:.2f} MB, {train.tokens:,} tokens")
    _say(f"      held out:   {held_out.documents} documents, {held_out.tokens:,} tokens")
    _say(f"      vocabulary: {prepared.vocabulary:,}")
    return prepared


def _train(config: RunConfig, settings: Sequence[str], fresh: bool) -> None:
    from megalm.train.interruption import STOPPING

    logs = Path(config.run.dir) / "logs"
    arguments = ["train", RECIPE, *(["--fresh"] if fresh else []), *settings]
    _say(f"      megalm {shlex.join(arguments)}")
    status = run_workers([sys.executable, "-m", "megalm", *arguments], _processes(config), logs, STOPPING)
    if status == Interrupted.exit_status:
        raise Interrupted(f"the training is saved; start it again to go on; what each rank said is in {logs}")
    if status != 0:
        kind = UserError if status == UserError.exit_status else MegalmError
        raise kind(f"training ended with status {status}; what each rank said is in {logs}")


def _evaluate(run: Path, data: PreparedData, config: RunConfig) -> Perplexities:
    from megalm.evaluation.baselines import bigram_baselines
    from megalm.evaluation.command import evaluate

    answer = evaluate(str(run))
    assert answer is not None, "this process is rank 0 of one"
    bigrams = bigram_baselines(data, config.model.sequence, config.evaluate.sequences, config.data.rows)
    _say(f"      on the same {answer['tokens']:,} held-out tokens:")
    _say(f"        bigram, add-one smoothing   perplexity {bigrams['add_one']:8.2f}")
    _say(f"        bigram, interpolated        perplexity {bigrams['interpolated']:8.2f}")
    _say(
        f"        {RECIPE}, {answer['step']:>4} steps        perplexity {answer['perplexity']:8.2f}   "
        f"{answer['bits_per_byte']:.3f} bits per byte"
    )
    return Perplexities(answer["perplexity"], bigrams["add_one"], bigrams["interpolated"])


def _draw(config: RunConfig, perplexities: Perplexities) -> None:
    from megalm.evaluation.picture import draw_losses
    from megalm.train.metrics_file import METRICS_FILE, read_metrics

    run, parallel = Path(config.run.dir), config.parallel
    records = read_metrics(run / METRICS_FILE)
    draw_losses(
        run / PICTURE,
        [(record["step"], record["train/loss"]) for record in records if "train/loss" in record],
        [(record["step"], record["evaluate/loss"]) for record in records if "evaluate/loss" in record],
        {
            "add-one bigram": perplexities.add_one_bigram,
            "interpolated bigram": perplexities.interpolated_bigram,
        },
        f"{RECIPE}: tensor {parallel.tensor} x pipeline {parallel.pipeline}, ZeRO {config.zero.stage}",
    )
    _say(f"      {run / PICTURE}")


def _sample(run: Path) -> None:
    from megalm.generation.command import generate

    text = generate(str(run), (), PROMPT, tokens=SAMPLE_TOKENS, temperature=0.5, top_k=40, seed=1)
    for line in (text or "").splitlines():
        _say(f"      | {line}")


def _tell_where(run: Path, config: RunConfig, seconds: float) -> None:
    _say(f"\nDone in {seconds:.0f} s. Where everything lies:")
    for path, what in (
        (Path(config.data.path), "the tokens, the tokenizer and the held-out split"),
        (run / "config.yaml", "the whole recipe, defaults included"),
        (run / "metrics.jsonl", "loss, learning rate, gradient norm, speed and memory of each logged step"),
        (run / PICTURE, "the picture of the losses"),
        (run / "checkpoints", "weights and optimizer, under names that do not depend on the layout"),
        (run / "logs", "what each rank said"),
    ):
        _say(f"  {path!s:<30} {what}")
    _say("What to try next:")
    data = f"data.path={config.data.path}"
    on_cpu = " run.device=cpu" if config.run.device == "cpu" else ""
    for command in (
        f'megalm generate {run} --prompt "A class is" --temperature 0.8',
        f"megalm evaluate {run} parallel.tensor=2",
        f"megalm checkpoint inspect {run}",
        f"megalm train {RECIPE} {data} run.dir=runs/dropout parallel.pipeline=2 model.dropout=0.1{on_cpu}",
        f"megalm config show {RECIPE}",
    ):
        _say(f"  {command}")
