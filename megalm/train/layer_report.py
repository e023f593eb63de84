"""What a run noted of its layers, as a table and a picture. No torch.

`layer_statistics` writes the file: a line a sampled step, `{"step": 100, "blocks.0/weight_norm": ..., ...}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.trained import trained_config
from megalm.errors import ConfigError
from megalm.train.metrics_file import read_metrics

INSPECT_FILE = "inspect.jsonl"
PICTURE_FILE = "inspect.png"

FIGURES = {
    "weight_norm": "norm of the weights",
    "gradient_norm": "norm of the gradient",
    "update_ratio": "update / weights",
    "activation_rms": "rms of the output",
    "dead_units": "dead feed-forward units",
    "attention_entropy": "attention entropy of a head in turn (nats)",
}
"""What is said of a layer, with its title."""
_LOGARITHMIC = ("weight_norm", "gradient_norm", "update_ratio", "activation_rms")


def layer_names(layers: int) -> list[str]:
    """Return what is told apart: all before the blocks, each block, all behind them."""
    return ["embedding", *(f"blocks.{index}" for index in range(layers)), "head"]


def inspect_run(run: Path) -> dict[str, Any]:
    """Draw RUN/inspect.png; return the last sample, by layer, and where the picture is.

    Raises ConfigError where there is no run or nothing was sampled, OSError where the picture cannot be written.
    """
    config = trained_config(run, ())
    path = run / INSPECT_FILE
    samples = read_metrics(path) if path.exists() else []
    if not samples:
        raise ConfigError(f"{path}: no layer was sampled in this run; train it on with inspect.every=100")
    names = layer_names(config.model.blocks)
    draw_layers(run / PICTURE_FILE, samples, names, f"{run}: layers")
    last = samples[-1]
    layers = {
        name: {figure: last[f"{name}/{figure}"] for figure in FIGURES if f"{name}/{figure}" in last} for name in names
    }
    return {
        "step": last["step"],
        "samples": len(samples),
        "layers": {name: figures for name, figures in layers.items() if figures},
        "picture": str(run / PICTURE_FILE),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result of `inspect_run` as lines of columns."""
    heads = ["layer", *(name.replace("_", " ") for name in FIGURES)]
    rows = [heads]
    for name, figures in result["layers"].items():
        rows.append([name, *(_written(figure, figures.get(figure)) for figure in FIGURES)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    return "\n".join([f"step {result['step']}", *lines, f"picture  {result['picture']}"])


def _written(figure: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if figure == "dead_units" else f"{value:.3g}"


def draw_layers(path: Path, samples: Sequence[dict[str, float]], names: Sequence[str], title: str) -> None:
    """Write a PNG with a panel for each figure: its value over the steps, a line a layer. Raises OSError."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, sharex=True).flatten()
    blocks = [name for name in names if name.startswith("blocks.")]
    depth = Normalize(0, max(1, len(blocks) - 1))
    colours = {name: colormaps["viridis"](depth(index)) for index, name in enumerate(blocks)}
    styles = {"embedding": ("tab:red", "--"), "head": ("0.3", ":")}
    for axes, (what, words) in zip(panels, FIGURES.items(), strict=True):
        for name in names:
            curve = [(sample["step"], sample[f"{name}/{what}"]) for sample in samples if f"{name}/{what}" in sample]
            curve = [(step, value) for step, value in curve if math.isfinite(value)]
            colour, style = styles.get(name, (colours.get(name), "-"))
            if curve:
                marker = "." if len(curve) < 30 else None
                axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.1, marker=marker)
        axes.set_title(words, fontsize=10)
        axes.grid(alpha=0.25)
        if what in _LOGARITHMIC:
            axes.set_yscale("log")
        elif what == "dead_units":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels[3:]:
        axes.set_xlabel("step")
    for name, (colour, style) in styles.items():
        panels[0].plot([], [], color=colour, linestyle=style, label=name)
    panels[0].legend(frameon=False, fontsize=8)
    scale, ticks = ScalarMappable(depth, colormaps["viridis"]), MaxNLocator(integer=True)
    figure.colorbar(scale, ax=panels.tolist(), label="block", ticks=ticks, shrink=0.6)
    figure.suptitle(title)
    figure.savefig(path, format="png")
