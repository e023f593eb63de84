"""The table of a scaling run in Markdown, padded so that it reads as plain text too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.answers import counted
from megalm.bench.figures import OTHER, PARTS
from megalm.train.tracking import format_bytes

_NONE = "-"
_HEADER = (
    *("ranks", "nodes", "global batch", "step ms", "tokens/s", "10th-90th percentile", "efficiency", "MFU"),
    *(*(f"{part} ms" for part in PARTS), f"{OTHER} ms", "peak memory"),
)


def markdown(result: Mapping[str, Any]) -> str:
    """Return a title, the table with a row for every point, and how it was measured."""
    points = result["points"]
    rows = [_HEADER, *(_row(point) for point in points)]
    on_nodes = any(point["nodes"] is not None for point in points)
    kept = [column for column, name in enumerate(_HEADER) if on_nodes or name != "nodes"]
    # A reason, in the fourth cell, is longer than any figure and must not widen its column.
    figures = [_HEADER, *(_row(point)[: 3 if point["why"] else None] for point in points)]
    widths = {column: max(len(row[column]) for row in figures if column < len(row)) for column in kept}
    lines = ["| " + " | ".join(f"{row[column]:>{widths[column]}}" for column in kept) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (widths[column] + 1) + ":" for column in kept) + "|")
    return "\n".join([f"# {title(result)}", "", *lines, "", how_measured(result), ""])


def title(result: Mapping[str, Any]) -> str:
    """Return what was scaled, and how."""
    return f"{result['mode'].capitalize()} scaling of {result['recipe'].rpartition('/')[2]}"


def how_measured(result: Mapping[str, Any]) -> str:
    """Return one line on what the figures mean and what they depend on."""
    code = result["code"]
    revision = "" if not code.get("revision") else f" ({code['revision'][:12]}{', changed' if code['changed'] else ''})"
    base = result["baseline_ranks"]
    against = (
        "no point was measured" if base is None else f"efficiency: tokens/s a rank, relative to {counted(base, 'rank')}"
    )
    batch = "the same global batch" if result["mode"] == "strong" else "the global batch grows with the ranks"
    return (
        f"{result['steps']} steps a point, the first {result['warmup_steps']} left out; {batch}, sequences of "
        f"{result['sequence']} tokens; medians, tokens/s of all ranks; {against}; parts of a step on rank 0, means of "
        "the middle half of the steps, the wait for other ranks and stages counted as communication; peak memory of "
        f"the rank that takes most. {result['layout']}; "
        f"{result['machine']}; {result['started'][:10]}, megalm {code['megalm']}{revision}, "
        f"torch {code.get('torch', 'unknown')}, Python {code['python']}."
    )


def _row(point: Mapping[str, Any]) -> tuple[str, ...]:
    first = (f"{point['ranks']}", _NONE if point["nodes"] is None else f"{point['nodes']}", f"{point['global_batch']}")
    if point["why"] is not None:
        reason = " ".join(f"{point['state']}: {point['why']}".split()).replace("|", "\\|")
        return (*first, reason, *[_NONE] * (len(_HEADER) - 4))
    parts = point["parts_s"] or {}
    return (
        *first,
        _ms(point["step_s"]),
        f"{point['tokens_per_s']:,.0f}",
        f"{point['tokens_low_per_s']:,.0f}-{point['tokens_high_per_s']:,.0f}",
        f"{point['efficiency']:.1%}",
        _NONE if point["mfu"] is None else f"{point['mfu']:.1%}",
        *(_ms(parts.get(part)) for part in (*PARTS, OTHER)),
        _NONE if point["peak_bytes"] is None else format_bytes(point["peak_bytes"]),
    )


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds * 1e3:,.4g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
