"""Who stopped first when no rank goes on any more, found from what the ranks last reported. No torch.

A rank that is ahead of others in the collectives of a group waits there for those that are behind; one that waits for
a message names its sender. Along these edges the wait leads to a rank that waits for nobody, which is the culprit. Only
where a collective was skipped the edges form a circle: the one who skipped waits further on in the program for those
whom it left waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megalm.distributed.progress import PHASES

STALE_S = 3.0
"""A rank writes its pulse several times a second; this long without one its interpreter does not run."""


@dataclass(frozen=True)
class Report:
    """The last that was heard of a rank."""

    rank: int
    host: str
    silent_s: float = 0.0
    """Since its watcher was last heard of."""
    stale_s: float = 0.0
    """Since it wrote its pulse."""
    stopped: bool = False
    """Its process is stopped (state T), as by SIGSTOP or a debugger."""
    step: int = 0
    phase: int = 0
    place: str = ""
    """Innermost line of the main thread, "file:line in function"."""
    waits_for: int | None = None
    collectives: Mapping[str, int] = field(default_factory=dict)
    """Collectives entered, by the group's name."""


@dataclass(frozen=True)
class Culprit:
    """A rank, and what is wrong with it in words."""

    rank: int
    reason: str


def find_culprits(reports: Mapping[int, Report]) -> list[Culprit]:
    """Return the ranks that stopped first, at least one, of a world whose last reports these are."""
    gone = [r for r in reports.values() if r.silent_s > STALE_S]
    stopped = [r for r in reports.values() if r.stopped and r not in gone]
    locked = [r for r in reports.values() if r.stale_s > STALE_S and r not in gone and r not in stopped]
    if gone or stopped or locked:
        return [
            *(Culprit(r.rank, f"is gone: its host {r.host} was last heard of {r.silent_s:.0f} s ago") for r in gone),
            *(Culprit(r.rank, f"is stopped, as by SIGSTOP or a debugger, {_where(r)}") for r in stopped),
            *(Culprit(r.rank, f"holds the interpreter lock, {_where(r)}") for r in locked),
        ]
    groups = _groups(reports)
    edges = _edges(reports, groups)
    waited_for = {target for targets in edges.values() for target in targets}
    free = [report for rank, report in reports.items() if not edges[rank]]
    if free:
        culprits = [report for report in free if report.rank in waited_for] or free
        first = min((r.step, r.phase) for r in culprits)
        return [Culprit(r.rank, f"does not go on, {_where(r)}") for r in culprits if (r.step, r.phase) == first]
    furthest = max((reports[rank] for rank in waited_for), key=lambda r: (r.step, r.phase, sum(r.collectives.values())))
    skipped = [name for name, ranks in groups.items() if furthest.rank in _behind(name, ranks, reports)]
    what = f"a collective of ranks {_listed(groups[skipped[0]])}" if skipped else "a message"
    return [
        Culprit(furthest.rank, f"skipped {what}: the others are there, it is already further on, {_where(furthest)}")
    ]


def _where(report: Report) -> str:
    return f"at step {report.step} in {PHASES[report.phase]}" + (f" ({report.place})" if report.place else "")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _groups(reports: Mapping[int, Report]) -> dict[str, list[int]]:
    """Return the ranks of each group: those that count its collectives."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(reports):
        for name in reports[rank].collectives:
            groups.setdefault(name, []).append(rank)
    return groups


def _behind(name: str, ranks: Sequence[int], reports: Mapping[int, Report]) -> set[int]:
    """Return the ranks of a group that have entered fewer of its collectives than another one."""
    counts = {rank: reports[rank].collectives[name] for rank in ranks}
    most = max(counts.values())
    return {rank for rank, count in counts.items() if count < most}


def _edges(reports: Mapping[int, Report], groups: Mapping[str, Sequence[int]]) -> dict[int, set[int]]:
    """Return for each rank those that it waits for."""
    edges: dict[int, set[int]] = {rank: set() for rank in reports}
    for rank, report in reports.items():
        if report.waits_for is not None:
            edges[rank].add(report.waits_for)
    for name, ranks in groups.items():
        behind = _behind(name, ranks, reports)
        for rank in set(ranks) - behind:
            edges[rank] |= behind
    return edges
