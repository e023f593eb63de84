"""Does the learning rate that is best for a narrow model stay the best for a wider one? With muP and without.

    megalm data prepare --corpus builtin --vocab 2048 --out data/builtin
    python benchmarks/width_transfer.py --data data/builtin

Two pictures in one. Above, the coordinate check: the size of what the last block and the head give, after each of the
first updates, over the width of the model; with muP it stays, without it grows with the width. Below, the loss after
the same tokens over the learning rate, a curve a width: with muP their lowest points stand above one another.

One process on the CPU; models differ in width alone, have the same data in the same order, and heads of one size.
Writes NAME.json and NAME.png, where --out is the name.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from in_process import trainer_of
from torch import Tensor, nn

from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.data.datasets import PreparedData, open_prepared
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.world import joined_mesh

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WAYS = ("standard", "muP")
COORDINATE_STEPS = 4
LAST_STEPS = 10  # whose mean loss counts


def recipe(options: argparse.Namespace, way: str, width: int, rate: float) -> RunConfig:
    """Return the recipe of one model."""
    values: dict[str, Any] = {
        "run.device": "cpu", "data.path": options.data, "model.layers": 2, "model.hidden": width,
        "model.heads": width // options.head_dim, "model.sequence": 64, "model.init_std": 0.1,
        "train.steps": options.steps, "train.global_batch": 16, "train.micro_batch": 16, "optim.lr": rate,
        "lr_schedule.kind": "constant", "lr_schedule.warmup_steps": 10, "model.init_depth_scaled": False,
    }  # fmt: skip
    if way == "muP":
        values["model.mup_base"] = options.widths[0]
    return load_recipe("gpt-tiny", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def coordinates(config: RunConfig, data: PreparedData, mesh: ParallelMesh) -> dict[str, list[float]]:
    """Return the root mean square of what blocks and head add to their first values, after each of some updates."""
    trainer = trainer_of(config, data, mesh)
    model: Any = trainer.engine.module
    batch = trainer.loader.batch(0, 16, 16)
    looked: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        looked[name] = output.detach().clone()

    last = list(model.blocks.values())[-1]
    for name, module in (("last block", last), ("logits", model.head)):
        module.register_forward_hook(partial(look, name))
    found: dict[str, list[float]] = {"last block": [], "logits": []}
    first: dict[str, Tensor] = {}
    for _ in range(COORDINATE_STEPS + 1):
        with torch.no_grad():
            model(batch.tokens_BT)
        first = first or dict(looked)
        for name, values in found.items():
            values.append(float((looked[name] - first[name]).square().mean().sqrt()))
        trainer.train_step()
    return {name: values[1:] for name, values in found.items()}


def final_loss(config: RunConfig, data: PreparedData, mesh: ParallelMesh) -> float:
    """Return the mean loss of the last steps."""
    trainer = trainer_of(config, data, mesh)
    losses = [trainer.train_step().loss for _ in range(config.train.steps)]
    return fmean(losses[-LAST_STEPS:])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the coordinates and losses of all widths, with muP and without."""
    torch.set_num_threads(options.threads)
    data = open_prepared(Path(options.data))
    measured: dict[str, Any] = {}
    with joined_mesh(recipe(options, "standard", options.widths[0], options.rates[0])) as mesh:
        for way in WAYS:
            moved, losses = {}, {}
            for width in options.widths:
                moved[width] = coordinates(recipe(options, way, width, options.coordinate_rate), data, mesh)
                losses[width] = [final_loss(recipe(options, way, width, rate), data, mesh) for rate in options.rates]
                best = min(zip(losses[width], options.rates, strict=True))
                print(f"{way:<9} width {width:<5} best rate {best[1]:.2g}, loss {best[0]:.3f}", flush=True)
            measured[way] = {"coordinates": moved, "losses": losses}
    return measured


def draw(measured: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """Draw the coordinate check above the curves of the losses, one column with muP and one without."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharey="row", layout="constrained")
    for column, way in enumerate(WAYS):
        above, below = axes[0][column], axes[1][column]
        moved, losses = measured[way]["coordinates"], measured[way]["losses"]
        for name, style in (("last block", "-"), ("logits", "--")):
            for step in range(COORDINATE_STEPS):
                sizes = [moved[width][name][step] for width in options.widths]
                label = f"{name}, update {step + 1}" if step in (0, COORDINATE_STEPS - 1) else None
                color = f"C{step}"
                above.plot(options.widths, sizes, style, marker="o", color=color, label=label)
        above.set(xscale="log", yscale="log", xlabel="hidden size", title=way, xticks=options.widths)
        above.set_xticklabels([str(width) for width in options.widths])
        above.minorticks_off()
        for number, width in enumerate(options.widths):
            best = min(range(len(options.rates)), key=losses[width].__getitem__)
            below.plot(options.rates, losses[width], marker=".", color=f"C{number}", label=f"hidden {width}")
            below.plot(options.rates[best], losses[width][best], "o", color=f"C{number}", markersize=10)
        below.set(xscale="log", xlabel="learning rate")
        below.legend()
    axes[0][0].set_ylabel("change since the first values (root mean square)")
    axes[0][1].legend(fontsize="small")
    axes[1][0].set_ylabel(f"loss after {options.steps} steps")
    lowest = min(min(values) for way in WAYS for values in measured[way]["losses"].values())
    axes[1][0].set_ylim(lowest - 0.1, lowest + 1.0)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/builtin", metavar="DIR")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], metavar="N", help="the base first")
    parser.add_argument("--head-dim", type=int, default=16, metavar="N")
    rates = [2.0**power for power in range(-10, -3)]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, metavar="X")
    parser.add_argument("--coordinate-rate", type=float, default=2.0**-7, metavar="X")
    parser.add_argument("--steps", type=int, default=100, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/width_transfer"), metavar="NAME")
    options = parser.parse_args()
    measured = measure(options)
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__, "machine": platform.machine()}
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(
        json.dumps({**facts, **settings, "measured": measured}, indent=1) + "\n"
    )
    draw(measured, options, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
