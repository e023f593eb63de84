"""The picture of a scaling run: speed against ranks beside the ideal, efficiency, and what a step is made of.

Owns the drawing; the figures are `collect`'s. matplotlib is used without its global state.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megalm.answers import counted
from megalm.bench.figures import OTHER, PARTS
from megalm.bench.table import title
from megalm.train.tracking import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"data": "#e69f00", "compute": "#0072b2", "communication": "#d55e00", OTHER: "#999999"}
_LINE, _IDEAL, _LOST = "#0072b2", "0.45", "#b00020"
_ROOM = 1.35  # of the logarithmic axis beyond the points
Points = Sequence[Mapping[str, Any]]
"""As they stand in `scaling.json`; those without figures have a reason, `why`."""


def draw(result: Mapping[str, Any]) -> bytes:
    """Return a PNG of what `collect.summary` gives; at least one point must have been measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points, base = result["points"], result["baseline_ranks"]
    assert base is not None, "no point was measured"
    figure = Figure(figsize=(11, 6.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    _draw_speed(figure.add_subplot(grid[:, 0]), points, base)
    _draw_efficiency(figure.add_subplot(grid[0, 1]), points, base)
    _draw_parts(figure.add_subplot(grid[1, 1]), points)
    figure.suptitle(title(result), fontsize=13, fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(_conditions(result), 150)), fontsize=8, color="0.35")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _conditions(result: Mapping[str, Any]) -> str:
    code = result["code"]
    batches = sorted({point["global_batch"] for point in result["points"]})
    batch = f"{batches[0]}" if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
    return (
        f"global batch {batch} sequences of {result['sequence']} tokens, {result['layout']}; medians of steps "
        f"{result['warmup_steps'] + 1} to {result['steps']}, bars: 10th to 90th percentile; {result['machine']}; "
        f"megalm {code['megalm']}, torch {code.get('torch', 'unknown')}, {result['started'][:10]}"
    )


def _draw_speed(axes: Axes, points: Points, base: int) -> None:
    """Draw tokens/s over ranks, both logarithmic, and the line on which every rank is as fast as in the first point."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    _prepare_ranks(axes, points)
    axes.set_yscale("log")
    known = [point for point in points if point["why"] is None]
    rates = _values(points, "tokens_per_s")
    ends = (base, max(point["ranks"] for point in points))
    ideal = [known[0]["tokens_per_s"] * end / base for end in ends]
    axes.plot(
        ends, ideal, color=_IDEAL, linestyle="--", linewidth=1.2, label=f"ideal: linear from {counted(base, 'rank')}"
    )
    below = [rate - low for rate, low in zip(rates, _values(points, "tokens_low_per_s"), strict=True)]
    above = [high - rate for rate, high in zip(rates, _values(points, "tokens_high_per_s"), strict=True)]
    ranks = [point["ranks"] for point in points]
    axes.errorbar(ranks, rates, [below, above], color=_LINE, marker="o", linewidth=1.8, capsize=4, label="measured")
    for point in known:
        rate = point["tokens_per_s"]
        _write(axes, format_count(rate), (point["ranks"], rate), (11, -13), ha="left", color=_LINE)
    least, most = min(point["tokens_low_per_s"] for point in known), max(point["tokens_high_per_s"] for point in known)
    axes.set_ylim(min(least, *ideal) / _ROOM, max(most, *ideal) * _ROOM)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if most < 20 * least else (1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("tokens/s of all ranks (log scale)")
    axes.legend(frameon=False, loc="upper left")


def _draw_efficiency(axes: Axes, points: Points, base: int) -> None:
    """Draw the speed of a rank over that of a rank of the smallest point, from 0 on."""
    from matplotlib.ticker import PercentFormatter

    _prepare_ranks(axes, points)
    shares = [100 * share for share in _values(points, "efficiency")]
    axes.axhline(100, color=_IDEAL, linestyle="--", linewidth=1.2)
    axes.plot([point["ranks"] for point in points], shares, color=_LINE, marker="o", linewidth=1.8)
    for point, share in zip(points, shares, strict=True):
        if point["why"] is None:
            _write(axes, f"{share:.0f}%", (point["ranks"], share), (0, -16), color=_LINE)
    axes.set_ylim(0, max(115, *(1.1 * share for share in shares if math.isfinite(share))))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylabel("efficiency")
    axes.set_title(f"tokens/s a rank, relative to {counted(base, 'rank')}", fontsize=10)


def _draw_parts(axes: Axes, points: Points) -> None:
    """Draw a bar a point: its step, divided into its parts where they were measured."""
    known = [point for point in points if point["why"] is None]
    unit, factor = ("seconds", 1.0) if max(point["step_s"] for point in known) >= 1 else ("milliseconds", 1e3)
    tops = [0.0] * len(points)
    divided = any(point["parts_s"] is not None for point in known)
    for part in (*PARTS, OTHER) if divided else ("step",):
        heights = [factor * _height(point, part) for point in points]
        axes.bar(range(len(points)), heights, 0.6, tops, color=_COLOURS.get(part, _LINE), label=part)
        tops = [top + height for top, height in zip(tops, heights, strict=True)]
    if divided:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    axes.set_title("what a step is made of, on rank 0" if divided else "a step", fontsize=10)
    for place, (point, top) in enumerate(zip(points, tops, strict=True)):
        if point["why"] is None:
            _write(axes, f"{top:.3g}", (place, top), (0, 3), color="0.2", bbox=None)
        else:
            _mark_lost(axes, place, point["state"])
    axes.set_xticks(range(len(points)), labels=[_rank_label(point) for point in points])
    axes.set_xlim(-0.7, len(points) - 0.3)
    axes.set_xlabel("ranks")
    axes.set_ylim(0, 1.18 * max(tops))
    axes.set_ylabel(f"{unit} a step")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)


def _height(point: Mapping[str, Any], part: str) -> float:
    """Return the seconds of a part; of a point without parts the step counts as other."""
    if point["why"] is not None:
        return 0.0
    if part == "step" or (part == OTHER and point["parts_s"] is None):
        return float(point["step_s"])
    return float((point["parts_s"] or {}).get(part, 0.0))


def _prepare_ranks(axes: Axes, points: Points) -> None:
    """Make the axis of ranks, logarithmic, with a tick a point; a cross stands where a point has no figures."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks([point["ranks"] for point in points], labels=[_rank_label(point) for point in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ranks (log scale)")
    first, last = points[0]["ranks"], points[-1]["ranks"]
    room = max(1.2, (last / first) ** 0.18)
    axes.set_xlim(first / room, last * room)
    axes.grid(alpha=0.25)
    for point in points:
        if point["why"] is not None:
            _mark_lost(axes, point["ranks"], point["state"])


def _mark_lost(axes: Axes, x: float, state: str) -> None:
    """Draw a cross and the state at the bottom."""
    bottom = axes.get_xaxis_transform()
    axes.plot(x, 0.05, "x", color=_LOST, markersize=7, markeredgewidth=2, transform=bottom)
    _write(axes, state, (x, 0.05), (0, 7), color=_LOST, xycoords=bottom)


def _write(axes: Axes, text: str, place: tuple[float, float], shift: tuple[float, float], **options: Any) -> None:
    """Write a text beside a place, `shift` points away; it stays legible on a line."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    options = {"ha": "center", "fontsize": 9, "bbox": box, **options}
    axes.annotate(text, place, xytext=shift, textcoords="offset points", **options)


def _values(points: Points, key: str) -> list[float]:
    """Return a figure of every point, NaN where it has none, which interrupts a line."""
    return [point[key] if point["why"] is None else math.nan for point in points]


def _rank_label(point: Mapping[str, Any]) -> str:
    nodes = "" if point["nodes"] is None else f"\n{counted(point['nodes'], 'node')}"
    return f"{point['ranks']}{nodes}"
