"""What a choice of the recipe is worth: the held-out loss after the same tokens, against the same baseline.

    megalm data prepare --corpus builtin --vocab 2048 --out data/builtin
    python benchmarks/recipes.py --data data/builtin

Every choice changes one thing of a small model: positions, norms, activations, optimizers, schedules. First each
optimizer gets a learning rate: from a start it is doubled or halved as long as that helps, by the worst of three seeds
of its own, as a rate at the edge of stability is good for some seeds only. Then each choice is trained on every seed,
with the baseline's rate where it is no optimizer, and as many weights: activations without a gate get half as wide a
feed-forward layer again. A seed gives initial weights and the order of the text, so a choice and the baseline are
compared seed by seed; intervals are those of Student's t over these differences, 95%.

Trains on the CPU, one process a core. Writes NAME.json and NAME.png at the end, where --out is the name, and prints
the table; --table prints that of a NAME.json that is there. With --choices some are measured and join those of a
NAME.json of the same sizes, if its baseline comes out the same again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import torch
from in_process import trainer_of

from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.data.datasets import open_prepared
from megalm.data.loader import HeldOut
from megalm.data.windows import all_windows
from megalm.distributed.world import joined_mesh
from megalm.evaluation.perplexity import held_out_loss
from megalm.files import write_durably

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SWEEP_SEEDS = (1000, 1001, 1002)
GATED = ("swiglu", "geglu")
LONGEST_WALK = 8  # rates of an optimizer
# The 97.5% quantile of Student's t by the number of differences.
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
BASELINE = "baseline"
DIVERGED = 1e9  # a number, as JSON has no infinity

Settings = dict[str, Any]
Walk = list[tuple[float, float]]


@dataclass(frozen=True)
class Choice:
    """One thing that differs from the baseline; without settings it is what the baseline has."""

    group: str
    name: str
    settings: Settings


def _kinds(group: str, key: str, *values: str) -> list[Choice]:
    return [Choice(group, value, {key: value}) for value in values]


ORIGINAL = {"optim.muon_adjust_lr_fn": "original", "optim.adamw_lr": 2**-8}
CHOICES = (
    Choice("positions", "rotary", {}),
    *_kinds("positions", "model.position", "learned", "sinusoidal", "alibi", "t5", "none"),
    Choice("norms", "rmsnorm before", {}),
    Choice("norms", "layernorm before", {"model.norm": "layernorm"}),
    Choice("norms", "rmsnorm after", {"model.norm_place": "post"}),
    Choice("norms", "rmsnorm before and after", {"model.norm_place": "sandwich"}),
    Choice("activations", "swiglu", {}),
    *_kinds("activations", "model.activation", "geglu", "gelu", "silu", "relu", "relu2"),
    Choice("optimizers", "adamw", {}),
    Choice("optimizers", "adam", {"optim.kind": "adam", "optim.weight_decay": 0.0}),
    Choice("optimizers", "lion", {"optim.kind": "lion", "optim.betas": [0.9, 0.99]}),
    Choice("optimizers", "rmsprop", {"optim.kind": "rmsprop", "optim.weight_decay": 0.0}),
    Choice("optimizers", "adagrad", {"optim.kind": "adagrad", "optim.weight_decay": 0.0}),
    Choice("optimizers", "muon", {"optim.kind": "muon"}),
    Choice("optimizers", "muon, original scale", {"optim.kind": "muon", **ORIGINAL}),
    Choice("optimizers", "sgd, momentum 0.9", {"optim.kind": "sgd", "optim.momentum": 0.9, "optim.weight_decay": 0.0}),
    Choice("schedules", "cosine to a tenth", {}),
    Choice("schedules", "constant", {"lr_schedule.kind": "constant"}),
    Choice("schedules", "linear to 0", {"lr_schedule.kind": "linear", "lr_schedule.min_lr_ratio": 0.0}),
    Choice("schedules", "constant, last fifth to 0", {"lr_schedule.kind": "constant", "cooldown": 0.2}),
    *_kinds("schedules", "lr_schedule.kind", "exponential", "step", "inverse_sqrt"),
)
# Where the walk to an optimizer's rate begins.
STARTS = {"adamw": 2**-8, "adam": 2**-8, "lion": 2**-10, "rmsprop": 2**-9, "adagrad": 2**-6, "sgd": 2**0, "muon": 2**-7}


def recipe(options: argparse.Namespace, settings: Settings, rate: float, seed: int) -> RunConfig:
    """Return the recipe of one run."""
    own = dict(settings)
    cooldown = own.pop("cooldown", 0.0)
    values: Settings = {
        "run.device": "cpu", "data.path": options.data, "seed": seed, "model.layers": 4, "model.hidden": options.hidden,
        "model.sequence": options.sequence, "train.steps": options.steps, "train.global_batch": options.batch,
        "train.micro_batch": options.batch, "optim.lr": rate, "lr_schedule.warmup_steps": options.steps // 10,
        "lr_schedule.cooldown_steps": int(cooldown * options.steps), "stability.spike_sigma": 0.0, **own,
    }  # fmt: skip
    if values.get("model.activation", "swiglu") not in GATED:
        gated = load_recipe("gpt-tiny", [f"model.hidden={options.hidden}"]).model.feed_forward
        values["model.ffn"] = gated * 3 // 2
    return load_recipe("gpt-tiny", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def trained_loss(config: RunConfig) -> float:
    """Train the recipe in this process; return its held-out loss in nats a token, 1e9 where it diverged."""
    torch.set_num_threads(1)
    data = open_prepared(Path(config.data.path))
    with joined_mesh(config) as mesh:
        trainer = trainer_of(config, data, mesh)
        for _ in range(config.steps):
            if trainer.train_step().wrong is not None:
                return DIVERGED
        windows = all_windows(data.validation, config.model.sequence, config.data.rows)
        held_out, sizes = HeldOut(data.validation, windows), data.tokenizer().byte_lengths
        model: Any = trainer.engine.module
        return held_out_loss(trainer.executor, model, held_out, sizes, mesh, config.train.micro_batch).loss


def walk(options: argparse.Namespace, settings: Settings) -> Walk:
    """Return the rates that were tried for an optimizer, and their worst losses: doubled or halved while that helps."""

    def loss(rate: float) -> float:
        return max(trained_loss(recipe(options, settings, rate, seed)) for seed in SWEEP_SEEDS)

    start = STARTS[settings.get("optim.kind", "adamw")]
    tried = {rate: loss(rate) for rate in (start, 2 * start)}
    factor = 2.0 if tried[2 * start] < tried[start] else 0.5
    while len(tried) < LONGEST_WALK:
        best = min(tried, key=tried.__getitem__)
        if factor * best in tried:
            break
        tried[factor * best] = loss(factor * best)
    return sorted(tried.items())


def measure(options: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Return the walks of all optimizers, and the losses of all choices, one a seed; equal runs are made once.

    `rates`: those of optimizers that are known.
    """
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        chosen = [choice for choice in CHOICES if choice.group in options.groups]
        if options.choices:
            chosen = [choice for choice in CHOICES if choice.name in options.choices]
        optimizers = [choice for choice in chosen if choice.group == "optimizers"]
        if "adamw" not in {*rates, *(choice.name for choice in optimizers)}:
            optimizers.append(Choice("optimizers", "adamw", {}))
        walks = dict(
            zip(
                [choice.name for choice in optimizers],
                pool.map(partial(walk, options), [choice.settings for choice in optimizers]),
                strict=True,
            )
        )
        rates = rates | {name: min(tried, key=lambda pair: pair[1])[0] for name, tried in walks.items()}
        for name, tried in walks.items():
            print(f"{name:<18} " + "  ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in tried), flush=True)
        different = {choice.name: choice for choice in chosen if choice.settings}
        wanted = {BASELINE: Choice("", BASELINE, {}), **different}
        jobs = [(choice, seed) for choice in wanted.values() for seed in range(options.seeds)]
        configs = [
            recipe(options, choice.settings, rates.get(choice.name, rates["adamw"]), seed) for choice, seed in jobs
        ]
        losses: dict[str, list[float]] = {name: [] for name in wanted}
        for (choice, seed), loss in zip(jobs, pool.map(trained_loss, configs), strict=True):
            losses[choice.name].append(loss)
            print(f"{choice.name:<26} seed {seed}  {loss:.4f}", flush=True)
    return {"walks": walks, "rates": rates, "losses": losses}


def earlier(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a file holds. Ends the program where it was measured in other sizes."""
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [
        size for size in ("steps", "seeds", "hidden", "sequence", "batch") if before[size] != getattr(options, size)
    ]
    if other:
        sys.exit(f"{file}: measured with {', '.join(f'--{size} {before[size]}' for size in other)}")
    return before


def joined(before: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return old and new measurements. Ends the program where their baselines differ."""
    old, new = before["losses"][BASELINE], measured["losses"][BASELINE]
    if any(abs(one - two) > 1e-6 for one, two in zip(old, new, strict=True)):
        sys.exit(f"the baseline was {old} and is {new}: measure all choices anew")
    return {part: {**before[part], **measured[part]} for part in ("walks", "rates", "losses")}


def rows_of(measured: dict[str, Any]) -> list[tuple[Choice, list[float], list[float]]]:
    """Return for each choice its losses and their differences from the baseline's, seed by seed."""
    base = measured["losses"][BASELINE]
    rows = []
    groups = {choice.group for choice in CHOICES if choice.settings and choice.name in measured["losses"]}
    for choice in CHOICES:
        if choice.group not in groups or (choice.settings and choice.name not in measured["losses"]):
            continue
        losses = measured["losses"][choice.name if choice.settings else BASELINE]
        rows.append((choice, losses, [own - other for own, other in zip(losses, base, strict=True)]))
    return rows


def half_width(differences: Sequence[float]) -> float:
    """Return half the 95% interval of the mean difference."""
    return QUANTILES[len(differences)] * stdev(differences) / math.sqrt(len(differences))


def table(measured: dict[str, Any]) -> str:
    """Return the table in Markdown; the walks' rates beside the optimizers."""
    lines = ["| | choice | held-out loss | difference |", "|---|---|---|---|"]
    last = ""
    for choice, losses, differences in rows_of(measured):
        rate = measured["rates"].get(choice.name)
        name = choice.name if rate is None else f"{choice.name} at {rate:.2g}"
        if DIVERGED in losses:
            told = "diverged"
        elif choice.settings:
            told = f"{fmean(differences):+.3f} ± {half_width(differences):.3f}"
        else:
            told = "baseline"
        lines.append(f"| {choice.group if choice.group != last else ''} | {name} | {fmean(losses):.3f} | {told} |")
        last = choice.group
    return "\n".join(lines)


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw a panel for each group: the differences of each choice, seed by seed, their mean and its interval."""
    rows = rows_of(measured)
    groups = list(dict.fromkeys(choice.group for choice, *_ in rows))
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    panels = axes.flatten()
    for panel, group in zip(panels, groups, strict=False):
        own = [row for row in rows if row[0].group == group]
        for place, (choice, losses, differences) in enumerate(own):
            if choice.settings and DIVERGED not in losses:
                panel.plot(differences, [place] * len(differences), ".", color="0.2", zorder=3)
                panel.errorbar(fmean(differences), place, xerr=half_width(differences), fmt="o", color="C0", capsize=3)
            elif choice.settings:
                panel.text(0.02, place, "diverged", transform=panel.get_yaxis_transform(), va="center", fontsize=8)
        panel.axvline(0.0, color="0.3", linewidth=0.8)
        panel.set(title=group, yticks=range(len(own)), ylim=(len(own) - 0.5, -0.5))
        panel.set_yticklabels([choice.name if choice.settings else f"{choice.name} (baseline)" for choice, *_ in own])
        panel.grid(axis="x", alpha=0.25)
    for panel in panels[len(groups) :]:
        panel.axis("off")
        lines = ("held-out loss minus the baseline's,", "in nats a token: left is better", "", "black: each seed")
        panel.text(0.0, 0.5, "\n".join((*lines, "blue: mean and 95% interval")), transform=panel.transAxes, va="center")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/builtin", metavar="DIR")
    groups = list(dict.fromkeys(choice.group for choice in CHOICES))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups, metavar="GROUP", help=", ".join(groups))
    names = [choice.name for choice in CHOICES if choice.settings]
    parser.add_argument("--choices", nargs="+", choices=names, metavar="CHOICE", help="these alone, by their names")
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(QUANTILES), metavar="N", help="2 to 8")
    parser.add_argument("--hidden", type=int, default=64, metavar="N")
    parser.add_argument("--sequence", type=int, default=64, metavar="N")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="sequences a step")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes, one a core")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipes"), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="print the table of NAME.json and train nothing")
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    if options.table:
        print(table(json.loads(file.read_text(encoding="utf-8"))["measured"]))
        return
    began = time.monotonic()
    before = earlier(file, options) if options.choices else None
    measured = measure(options, before["measured"]["rates"] if before else {})
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    settings = {key: value for key, value in vars(options).items() if key not in ("choices", "out", "table")}
    if before is not None:
        measured = joined(before["measured"], measured)
        facts["seconds"] += before["seconds"]
        settings["groups"] = before["groups"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    whole = {**facts, **settings, "measured": measured}
    write_durably(file, (json.dumps(whole, indent=1) + "\n").encode())
    draw(measured, options.out.with_suffix(".png"))
    print(f"\n{table(measured)}\n\n{facts['seconds']} s, {file}", file=sys.stdout)


if __name__ == "__main__":
    main()
