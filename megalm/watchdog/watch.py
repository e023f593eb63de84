"""A rank's own side of the watchdog: starts its watcher, writes its pulse, can write its stacks and end at once.

The watcher is started before any group is formed, joins those of the other ranks once the world is formed, and leaves
with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megalm.distributed.exchange import broadcast_json
from megalm.distributed.progress import progress
from megalm.errors import FROZEN, HUNG
from megalm.watchdog.pulse import Pulse

_INTERVAL_S = 0.2


@contextmanager
def watched(timeout_s: float) -> Iterator[Callable[[], None]]:
    """Start the watcher (none for a time-out of 0) and give what every rank calls when the world is formed."""
    if not timeout_s:
        yield lambda: None
        return
    watchdog = Watchdog(timeout_s)
    try:
        yield watchdog.join
    finally:
        watchdog.leave()


class Watchdog:
    """Has this rank watched by a process of its own."""

    def __init__(self, timeout_s: float) -> None:
        """Start the watcher. It does nothing before `join`."""
        self._timeout_s = timeout_s
        self._pulse = Pulse()
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "megalm.watchdog.sentinel", str(os.getpid()), str(self._pulse.descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._pulse.descriptor],
        )
        self._done = threading.Event()
        self._main_thread = threading.main_thread().ident
        _obey_in_c()

    def join(self) -> None:
        """Be watched: a rank of this world that does not go on for the time-out ends all. Every rank calls."""
        meeting: Any = None
        if dist.get_rank() == 0:
            self._tell(command="serve")
            assert self._watcher.stdout is not None
            meeting = json.loads(self._watcher.stdout.readline())
        meeting = broadcast_json(meeting, dist.group.WORLD)
        self._write()
        progress.mirror = self._pulse.mark
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()
        host = os.environ["MASTER_ADDR"]
        self._tell(command="join", rank=dist.get_rank(), timeout_s=self._timeout_s, host=host, **meeting)

    def leave(self) -> None:
        """Be watched no more; safe to call twice, and without `join`."""
        self._done.set()
        progress.mirror = None
        try:
            self._tell(command="leave")
            self._watcher.communicate(timeout=5)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._watcher.kill()
            self._watcher.wait()

    def _tell(self, **command: Any) -> None:
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(json.dumps(command).encode() + b"\n")
        self._watcher.stdin.flush()

    def _beat(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._write()

    def _write(self) -> None:
        state = dist.distributed_c10d._world
        counts = {
            state.pg_names[group]: group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            for group in list(state.pg_map)
        }
        self._pulse.write(
            {
                "progress": [progress.acts, sum(counts.values())],
                "waits_for": progress.waits_for,
                "collectives": counts,
                "place": self._place(),
            }
        )

    def _place(self) -> str:
        """Return the innermost line of the main thread in this package: what a reader wants to know first."""
        frame = sys._current_frames().get(self._main_thread or 0)
        while frame is not None and "megalm" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            return ""
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


class _Action(ctypes.Structure):
    """Linux's `struct sigaction`, see sigaction(2)."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def _obey_in_c() -> None:
    """Have two signals obeyed without the interpreter, which may be locked.

    FROZEN writes the stacks, and then its thread, which is the main one unless that blocks it, stays in libc's `pause`,
    where no other signal reaches it than HUNG. The handler of HUNG is libc's `_exit` itself, called with the signal's
    number, which thus is the exit status.
    """
    libc = ctypes.CDLL(None)
    end = _Action(handler=ctypes.cast(libc._exit, ctypes.c_void_p))
    stay = _Action(handler=ctypes.cast(libc.pause, ctypes.c_void_p))
    libc.sigfillset(end.mask)  # else FROZEN, come at the same time, would be obeyed before it
    libc.sigfillset(stay.mask)
    libc.sigdelset(stay.mask, HUNG)
    libc.sigaction(HUNG, ctypes.byref(end), None)
    libc.sigaction(FROZEN, ctypes.byref(stay), None)
    faulthandler.register(FROZEN, all_threads=True, chain=True)
