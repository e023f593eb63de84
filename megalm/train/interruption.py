"""A request to stop that reaches one rank, agreed on by all: SIGTERM or SIGUSR1, as Slurm sends before a time limit,
and Ctrl-C.

Handlers stand before torch is imported, and the launcher of this machine holds the signals back until then, so that
none is lost. No torch at the top for that reason.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_INSISTING = (signal.SIGTERM, signal.SIGINT)
_INSIST_S = 5.0  # launchers and Slurm may both send one signal; later ones are somebody who does not want to wait


class Interruption:
    """Catches the signals that ask to stop; `agreed` tells of them on all ranks after the same step.

    The ranks' requests are joined by one all-reduce of a number a step, which runs while the next step computes: a
    request is acted on at most two steps after it came. A SIGTERM or Ctrl-C that comes again some seconds later ends
    the process at once, as it does by default; not SIGTERM under Slurm, which kills by itself, if need be.
    """

    def __init__(self) -> None:
        self.received = 0
        """The signal that this process has got; 0: none."""
        self._exchange: tuple[torch.Tensor, torch.distributed.Work | None] | None = None
        self._since = 0.0
        for number in STOPPING:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        atexit.register(_ignore)

    def _note(self, number: int, frame: FrameType | None) -> None:
        kills_later = number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ
        insists = number == self.received and number in _INSISTING and not kills_later
        if insists and time.monotonic() - self._since > _INSIST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self._since = number, time.monotonic()

    @contextmanager
    def by_hand(self, tell: bool) -> Iterator[None]:
        """Have Ctrl-C ask to stop too; without this it ends the program at once. `tell`: say what it does."""

        def note(number: int, frame: FrameType | None) -> None:
            if tell and not self.received:
                os.write(2, f"Ctrl-C: saves and stops; again after {_INSIST_S:.0f} s stops without\n".encode())
            self._note(number, frame)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            if not self.received:  # else a further Ctrl-C must not break what is done at the end
                signal.signal(signal.SIGINT, before)

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """Return the signal that any rank had received a step ago, None if none had. Every rank of the world calls."""
        import torch
        import torch.distributed as dist

        before, self._exchange = self._exchange, None
        number = 0
        if before is not None:
            flag, work = before
            if work is not None:
                work.wait()
            number = int(flag.item())
        if number:
            return signal.Signals(number)
        flag = torch.tensor(self.received, dtype=torch.int32, device=device)
        self._exchange = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return None


def _ignore() -> None:
    """Have a signal that comes after all work is done change nothing: the interpreter's end gives it its default."""
    for number in (*STOPPING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
