"""The picture of a run of the kernel benchmark: each pass under the roof that bandwidth and products make.

python benchmarks/roofline.py benchmarks/results/kernels.json      # writes kernels.png beside it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers import OURS

COLOURS = {"forward": "tab:blue", "backward": "tab:orange", "both": "tab:green"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the rate over the FLOPs a byte of each pass, ours filled, the fastest other hollow."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = results["rates"]
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    intensities = []
    for case, result in results["cases"].items():
        for name, passed in result["passes"].items():
            intensity = passed["flops"] / passed["bytes"]
            found = {who: x["tflop_s"] for who, x in passed["contestants"].items()}
            others = [rate for who, rate in found.items() if who != OURS]
            if found:
                intensities.append(intensity)
            if others:
                axes.plot(intensity, max(others), "o", color=COLOURS[name], markerfacecolor="none", markersize=7)
            if OURS in found:
                axes.plot(intensity, found[OURS], "o", color=COLOURS[name], markersize=5)
                axes.annotate(
                    case, (intensity, found[OURS]), textcoords="offset points", xytext=(5, -9), fontsize=6, color="0.3"
                )
    low, high = (min(intensities) / 2, max(intensities) * 2) if intensities else (0.1, 1e3)
    x = np.geomspace(low, high, 200)
    roof = np.minimum(rates["copy_bytes_s"] * x, rates["product_flop_s"]) * 1e-12
    axes.plot(x, roof, color="0.2", linewidth=1.0, label="measured copy and bf16 product")
    for name, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=f"{name}: {OURS}")
    axes.plot([], [], "o", color="0.4", markerfacecolor="none", label="fastest other")
    axes.set_xlabel("FLOPs for each byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    machine = results["machine"]
    title = f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date'][:10]}"
    axes.set_title(title if results["measurement"] else f"{results['note']}\n{title}", fontsize=9)
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text("utf-8")), source.with_suffix(".png"))
