"""A save beside training: a thread of its own, at most one at a time, and tries where a disk refuses.

Owns: the thread, the tries, and the wait for them, which counts as progress of the program while the disk takes
anything from any rank, so that the watchdog tells a slow disk from one that hangs. What is written is `writer.py`'s,
what becomes of a save that failed is the trainer's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.distributed.meeting import Meeting
from megalm.distributed.progress import progress
from megalm.errors import DistributedError, StorageError

logger = logging.getLogger(__name__)

PAUSES_S = (1.0, 5.0, 20.0)
"""Before the second try and each further one: faults of storage are often over by then."""
_LOOK_S = 1.0


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on all ranks but for the times and the bytes (of all ranks on rank 0)."""

    step: int
    path: Path
    error: Exception | None = None
    write_s: float = 0.0
    bytes: int = 0


Write = Callable[[], tuple[Path, int]]


def try_to_save(step: int, path: Path, write: Write, pauses_s: Sequence[float] = PAUSES_S, tells: bool = True) -> Saved:
    """Call `write` until it succeeds, at most once more than there are pauses; only a StorageError is tried again.

    All ranks call: the error of a write is the same on all of them, so they try together. `tells`: this rank says so.
    """
    begin, error = time.perf_counter(), None
    for pause_s in (*pauses_s, None):
        try:
            path, size = write()
            return Saved(step, path, None, time.perf_counter() - begin, size)
        except StorageError as refused:
            error = refused
            if pause_s is not None:
                if tells:
                    logger.warning("%s; trying again in %g s", refused, pause_s)
                _pause(pause_s)
        except Exception as wrong:
            return Saved(step, path, wrong, time.perf_counter() - begin)
    return Saved(step, path, error, time.perf_counter() - begin)


def _pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_LOOK_S, left))
        progress.act()  # a pause is no hang


class Flight:
    """A save on its way in a thread."""

    def __init__(self, step: int, work: Callable[[], Saved], meeting: Meeting | None) -> None:
        """Start it. `meeting` (None: one process) is the one that the work uses."""
        self.step = step
        self.begun = time.monotonic()
        self._meeting = meeting
        self._result: Saved | None = None
        self._told, self._total = progress.background_acts, -1
        self._quiet_since = time.monotonic()
        # A daemon: where the disk hangs for ever, the process must still be able to end.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Saved]) -> None:
        self._result = work()

    def result(self) -> Saved | None:
        """Return how it ended, None while it goes on."""
        return None if self._thread.is_alive() else self._ended()

    def wait(self, silence_s: float | None = None) -> Saved | None:
        """Return how it ended; None once nothing has gone on for `silence_s` (None: wait on). The main thread calls."""
        self._quiet_since = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_LOOK_S)
            if self._goes_on():
                progress.act()
            elif silence_s is not None and time.monotonic() - self._quiet_since > silence_s:
                return None
        return self._ended()

    def quiet_s(self) -> float:
        """Return since when nothing is known to have gone on; to be called now and then."""
        self._goes_on(everywhere=False)
        return time.monotonic() - self._quiet_since

    def give_up(self) -> None:
        """Leave the thread to itself; its next wait for the other ranks ends it."""
        if self._meeting is not None:
            self._meeting.give_up()

    def _goes_on(self, everywhere: bool = True) -> bool:
        """Say whether this rank, or (`everywhere`) any, has written something since the last look."""
        acts = progress.background_acts
        more, self._told = acts - self._told, acts
        moved = more > 0
        if everywhere and self._meeting is not None and self._thread.is_alive():
            try:
                total = self._meeting.acts(more)
            except DistributedError:  # the work itself meets it, and says so
                return moved
            moved, self._total = total != self._total, total
        if moved:
            self._quiet_since = time.monotonic()
        return moved

    def _ended(self) -> Saved:
        assert self._result is not None, "the thread of a save ended without a result"
        return self._result
