"""Slow ranks: in a step all ranks wait for the slowest, so what tells it is the time that it does not wait.

Each rank's own seconds a step, the whole less its communication, are gathered now and then: one small all-gather. A
rank is held against those that do the same work, the ranks of its pipeline stage. It must be slow in both halves of the
steps looked at: a machine that is busy with something else for a moment is none to exclude.
Source: Lin et al. 2025 (stragglers in large jobs): most slow jobs have a few slow workers, or uneven stages.
"""

from __future__ import annotations

import socket
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megalm.distributed.exchange import gather_json
from megalm.distributed.mesh import ParallelMesh
from megalm.files import write_table
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, StepTimes, Trainer

SLOWER = 1.1
"""A rank is slow at this many times the median of its peers."""
RANK_TIMES_FILE = "rank_times.tsv"
_ERRORS = 4.0  # and this many standard errors above it


@dataclass(frozen=True)
class RankTime:
    """Medians of one rank's steps, in seconds."""

    data_s: float
    compute_s: float
    communication_s: float
    error_s: float
    """The standard error of the median of compute and data together."""

    @property
    def busy_s(self) -> float:
        """Seconds a step in which the others may have waited for this rank."""
        return self.compute_s + self.data_s


@dataclass(frozen=True)
class SlowRank:
    """A rank that is slower than its peers."""

    rank: int
    busy_s: float
    median_s: float
    part: str
    """What takes it longer: "compute" or "data"."""


def summary(times: Sequence[StepTimes]) -> RankTime:
    """Return the medians of two steps or more. The error is that of a normal distribution with their quartiles."""
    low, _, high = statistics.quantiles((own.compute_s + own.data_s for own in times), n=4, method="inclusive")
    error = 1.2533 * 0.7413 * (high - low) / len(times) ** 0.5
    names = ("data_s", "compute_s", "communication_s")
    medians = {name: statistics.median(getattr(own, name) for own in times) for name in names}
    return RankTime(**medians, error_s=error)


def slow_ranks(times: Sequence[RankTime], stages: Sequence[int]) -> list[SlowRank]:
    """Return the ranks that take `SLOWER` times the median of their stage, the slowest first; `stages` is by rank.

    The difference must also be beyond the error of the measurement: steps that vary much say little.
    """
    found = []
    for stage in sorted(set(stages)):
        ranks = [rank for rank, own in enumerate(stages) if own == stage]
        names = ("busy_s", "compute_s", "data_s", "error_s")
        middle, compute, data, error = (
            statistics.median(getattr(times[rank], name) for rank in ranks) for name in names
        )
        for rank in ranks:
            own = times[rank]
            if own.busy_s > SLOWER * middle and own.busy_s - middle > _ERRORS * max(own.error_s, error):
                part = "data" if own.data_s - data > own.compute_s - compute else "compute"
                found.append(SlowRank(rank, own.busy_s, middle, part))
    return sorted(found, key=lambda slow: slow.median_s / slow.busy_s)


def slow_throughout(first: Sequence[RankTime], second: Sequence[RankTime], stages: Sequence[int]) -> list[SlowRank]:
    """Return the ranks that are slow in both halves of some steps, as they are in the second."""
    before = {slow.rank for slow in slow_ranks(first, stages)}
    return [slow for slow in slow_ranks(second, stages) if slow.rank in before]


class NameStragglers:
    """Compare the ranks' times every `every` steps (0: never), over four times as many, and report who is slow.

    The times that were compared last lie in the run's `rank_times.tsv`.
    """

    def __init__(self, tracker: Tracker, every: int, mesh: ParallelMesh, run_dir: Path) -> None:
        """Every rank of the world must call."""
        self.tracker = tracker
        self.every = every if mesh.layout.world_size > 1 else 0
        self.file = run_dir / RANK_TIMES_FILE
        self.stages = [mesh.layout.coordinates(rank).pipeline for rank in range(mesh.layout.world_size)]
        self.hosts = gather_json(socket.gethostname(), dist.group.WORLD) if self.every else []
        self._times: deque[StepTimes] = deque(maxlen=4 * self.every)
        self._named: set[int] = set()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Take down the step's times, and compare them where it is time."""
        self._times.append(result.times)
        if not self.every or trainer.state.step % self.every or len(self._times) < 4 * self.every:
            return
        times, half = list(self._times), 2 * self.every
        own = [astuple(summary(part)) for part in (times[:half], times[half:])]
        mine = torch.tensor(own, dtype=torch.float64, device=trainer.mesh.device).view(-1)
        everyone = mine.new_empty(len(self.stages) * mine.numel())
        dist.all_gather_into_tensor(everyone, mine)
        if trainer.mesh.rank == 0:
            rows = everyone.view(len(self.stages), 2, -1).transpose(0, 1).tolist()
            first, second = ([RankTime(*row) for row in part] for part in rows)
            self._report(trainer.state.step, slow_throughout(first, second, self.stages))
            self._write(trainer.state.step, second)

    def _report(self, step: int, slow: Sequence[SlowRank]) -> None:
        for one in slow:
            if one.rank not in self._named:
                facts = {"rank": one.rank, "host": self.hosts[one.rank], "part": one.part}
                figures = {"busy_s": one.busy_s, "median_s": one.median_s, "ratio": one.busy_s / one.median_s}
                self.tracker.event({"step": step, "event": "slow rank", **facts, **figures})
        now = {one.rank for one in slow}
        for rank in sorted(self._named - now):
            self.tracker.event({"step": step, "event": "rank no longer slow", "rank": rank, "host": self.hosts[rank]})
        self._named = now

    def _write(self, step: int, times: Sequence[RankTime]) -> None:
        """Replace the file."""
        lines = ["step\trank\thost\tstage\tdata_s\tcompute_s\tcommunication_s"]
        for rank, (own, host, stage) in enumerate(zip(times, self.hosts, self.stages, strict=True)):
            figures = "\t".join(f"{seconds:.6f}" for seconds in (own.data_s, own.compute_s, own.communication_s))
            lines.append(f"{step}\t{rank}\t{host}\t{stage}\t{figures}")
        write_table(self.file, lines)

    def at_end(self, trainer: Trainer) -> None:
        """Too few steps are left to say anything."""
