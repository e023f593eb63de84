"""What a user sees of findings: tables for people, objects for programs, a line to paste for the batch system."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from megalm.answers import counted
from megalm.preflight.cluster import Cluster, Node
from megalm.preflight.finding import Finding, gib, worst

_SHOWN_NODES = 32


def machine_table(findings: Sequence[Finding]) -> str:
    """Return check, level and finding a line, each remedy below what it heals, and a line that sums up."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.check:<{width}}  {finding.level:<4}  {finding.text}")
        if finding.remedy and finding.level != "ok":
            lines.append(f"{'':<{width}}        -> {finding.remedy}")
    return "\n".join([*lines, "", summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    """Return how many findings failed and warn."""
    failed, warned = (sum(finding.level == level for finding in findings) for level in ("fail", "warn"))
    return f"{failed} failed, {warned} warning{'' if warned == 1 else 's'}, {len(findings) - failed - warned} ok"


def machine_object(node: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return one machine's findings as JSON values."""
    return {"node": node, "level": worst(findings), "findings": [finding.as_json() for finding in findings]}


def exclude_line(names: Sequence[str]) -> str:
    """Return the option of sbatch and srun that leaves the nodes out."""
    return shlex.quote("--exclude=" + ",".join(names))


def cluster_table(cluster: Cluster) -> str:
    """Return a line of figures for each node (in large clusters: each conspicuous one), the findings, what to paste."""
    shown = [node for node in cluster.nodes if len(cluster.nodes) <= _SHOWN_NODES or node.level != "ok"]
    head = ("node", "ranks", "state", "product", "disk free", "disk MB/s", "clock ms", "GB/s", "latency us")
    rows = [head, *(_row(node) for node in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(shown) < len(cluster.nodes):
        lines.append(f"and {counted(len(cluster.nodes) - len(shown), 'node')} without findings")
    lines += ["", *_finding_lines(cluster)]
    if cluster.all_reduce:
        parts = [f"{_size(size)}: {rate / 1e9:.3g} GB/s" for size, rate in cluster.all_reduce.items()]
        lines.append(f"all-reduce over all ranks, bus bandwidth: {', '.join(parts)}")
    bad = len(cluster.failed)
    ranks = sum(len(node.ranks) for node in cluster.nodes)
    lines.append(f"{counted(len(cluster.nodes), 'node')}, {counted(ranks, 'rank')}, {bad} failed")
    if bad:
        lines.append(exclude_line(cluster.failed))
    return "\n".join(lines)


def _row(node: Node) -> tuple[str, ...]:
    values = node.values

    def shown(key: str, scale: float, digits: int = 0) -> str:
        return f"{values[key] * scale:.{digits}f}" if key in values else "-"

    slowest = min(values.get("rates", {}).values(), default=None)
    product = "-" if slowest is None else f"{slowest / 1000:.3g} TF/s" if slowest >= 1000 else f"{slowest:.3g} GF/s"
    free = gib(values["disk_free_bytes"]) if "disk_free_bytes" in values else "-"
    return (
        node.name,
        _span(node.ranks),
        node.level,
        product,
        free,
        shown("disk_mb_s", 1),
        shown("offset_s", 1e3, 2),
        shown("bytes_per_s", 1e-9, 3),
        shown("latency_s", 1e6),
    )


def _span(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"


def _finding_lines(cluster: Cluster) -> list[str]:
    """Return the findings, the gravest first; what many nodes share is one line."""
    owners: dict[tuple[str, str, str, str], list[str]] = {}
    for node in cluster.nodes:
        for finding in node.findings:
            key = (finding.level, finding.check, finding.text, finding.remedy)
            owners.setdefault(key, []).append(node.name)
    for finding in cluster.findings:
        owners[finding.level, finding.check, finding.text, finding.remedy] = []
    lines = []
    for (level, check, text, remedy), names in sorted(owners.items(), key=lambda item: item[0][0] != "fail"):
        if level == "ok" and names:
            continue
        who = f"{_named(names, len(cluster.nodes))}: " if names else ""
        lines.append(f"{level:<4}  {who}{check}: {text}")
        if remedy and level != "ok":
            lines.append(f"      -> {remedy}")
    return [*lines, ""] if lines else []


def _named(names: Sequence[str], count: int) -> str:
    if len(names) == count and count > 1:
        return f"all {count} nodes"
    names = list(dict.fromkeys(names))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def cluster_object(cluster: Cluster) -> dict[str, Any]:
    """Return the judged cluster as JSON values."""
    nodes = [
        {
            "node": node.name,
            "ranks": list(node.ranks),
            "level": node.level,
            "values": dict(node.values),
            "findings": [finding.as_json() for finding in node.findings],
        }
        for node in cluster.nodes
    ]
    return {
        "level": cluster.level,
        "failed": cluster.failed,
        "exclude": exclude_line(cluster.failed) if cluster.failed else "",
        "nodes": nodes,
        "findings": [finding.as_json() for finding in cluster.findings],
        "all_reduce_bytes_per_s": {str(size): rate for size, rate in cluster.all_reduce.items()},
    }
