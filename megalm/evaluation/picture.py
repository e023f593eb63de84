"""The picture of a run: its losses over the steps, beside those of simple models.

Owns the drawing; where the figures come from is left to the caller. matplotlib is used without its global
state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[float, float]]
"""(step, loss in nats per token), by step."""


def draw_losses(path: Path, training: Curve, held_out: Curve, baselines: Mapping[str, float], title: str) -> None:
    """Write a PNG of the training and held-out losses, with a horizontal line for each baseline's perplexity.

    The right axis gives the perplexity, exp(loss). Points that are not finite are left out. Raises OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _finite(training)
    axes.plot(steps, losses, color="tab:blue", linewidth=1.0, label="training")
    steps, losses = _finite(held_out)
    axes.plot(steps, losses, color="tab:orange", marker="o", linewidth=1.5, label="held-out")
    for index, (name, perplexity) in enumerate(sorted(baselines.items(), key=lambda item: -item[1])):
        axes.axhline(
            math.log(perplexity),
            color="0.45",
            linestyle=("--", ":", "-.")[index % 3],
            label=f"{name}, held-out (perplexity {perplexity:.1f})",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    right = axes.secondary_yaxis("right")
    right.set_ylabel("perplexity")
    low, high = axes.get_ylim()
    ticks = [tick for tick in (2.0**power for power in range(40)) if low <= math.log(tick) <= high]
    right.set_yticks([math.log(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    figure.savefig(path, format="png")


def _finite(curve: Curve) -> tuple[list[float], list[float]]:
    points = [(step, loss) for step, loss in curve if math.isfinite(loss)]
    return [step for step, _ in points], [loss for _, loss in points]
