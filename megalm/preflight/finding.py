"""What a check found, and how a check is run: in bounded time, and without ever stopping the others. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megalm.distributed.time_limit import within

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One line of the answer. `remedy` is what to paste or to change; `values` is what nodes are compared by."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Finding:
        """Return the finding that `as_json` wrote."""
        return cls(**value)


@dataclass(frozen=True)
class Place:
    """Where checks look: the run's directory, the space that the run needs there, this process's environment.

    `device` is the index of the only GPU to look at; None: all of them. `local_ranks` are processes on this machine.
    """

    run_dir: Path = Path(".")
    needed_bytes: int = 2**30
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    local_ranks: int = 1
    device: int | None = None


@dataclass(frozen=True)
class Check:
    """A named function of a place. `every_rank`: each rank of a node runs it, for its own device and CPUs."""

    name: str
    run: Callable[[Place], Iterable[Finding]]
    every_rank: bool = False
    limit_s: float = 20.0


def run_check(check: Check, place: Place) -> list[Finding]:
    """Return what the check found; an error, or a check that is not done in time, is a finding too."""
    try:
        return within(check.limit_s, lambda: list(check.run(place)))
    except TimeoutError:
        text = f"no answer within {check.limit_s:.0f} s: a device, a driver or a file system hangs"
        return [Finding(check.name, "fail", text, "see dmesg and the state of processes: ps -eo pid,stat,wchan,args")]
    except Exception as error:
        text = f"could not be checked: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Finding(check.name, "warn", text, "look at it by hand")]


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among the findings; `ok` for none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def gib(count: float) -> str:
    """Return a number of bytes for people to read."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
