"""What this process does at this moment, in a few numbers: written by who does it, read by the watchdog. No torch.

A thread that saves beside the main one counts for itself: its work is not progress of the step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

PHASES = ("starting", "data", "forward and backward", "gradient reduction", "update", "after the step")

_UNSEEN = nullcontext()


class Observer(Protocol):
    """Looks at the work while it is done, as the profiler does."""

    def phase(self, name: str) -> None:
        """See a phase of a step begin."""

    def work(self, kind: str, what: object) -> AbstractContextManager[Any]:
        """Return what a piece of work is done in."""


@dataclass
class Progress:
    """How far this process has come in its program; it only ever goes on."""

    step: int = 0
    """The step being made, from 1."""
    phase: int = 0
    """Place in PHASES."""
    acts: int = 0
    """Pieces of work done: phases, microbatches through the stage, messages, blocks of a checkpoint."""
    background_acts: int = 0
    """Those of the thread beside the main one."""
    waits_for: int | None = None
    """The global rank whose message it waits for, or that is to take one."""

    mirror: Callable[[int, int], None] | None = None
    """Is told step and phase at once; the rest is read now and then."""
    observer: Observer | None = None
    """Is told of phases and pieces of work, by their names."""

    def act(self) -> None:
        """Note a piece of work, which the main thread or the one beside it has done."""
        if threading.current_thread() is threading.main_thread():
            self.acts += 1
        else:
            self.background_acts += 1

    def enter(self, step: int, phase: str) -> None:
        """Note the beginning of a phase of a step."""
        self.step, self.phase = step, PHASES.index(phase)
        self.acts += 1
        if self.mirror is not None:
            self.mirror(self.step, self.phase)
        if self.observer is not None:
            self.observer.phase(phase)

    def doing(self, kind: str, what: object) -> AbstractContextManager[Any]:
        """Return what a piece of work is done in: a microbatch's `forward`, a call of `communication`."""
        return _UNSEEN if self.observer is None else self.observer.work(kind, what)

    @contextmanager
    def waiting(self, rank: int) -> Iterator[None]:
        """Note that a neighbour is waited for."""
        self.waits_for = rank
        try:
            yield
        finally:
            self.waits_for = None
            self.acts += 1


progress = Progress()
"""This process's own."""
