"""How often, how much and how long DeepSpeed communicates: what `comms_logger` in a DeepSpeed JSON turns on.

Stands in for DeepSpeed's own CommsLogger (0.19.8), which is told of each call. That one is given the time of all calls
of a name so far for the time of each, as the timer beneath is never reset; takes a call that returns at once for one
that is over; reckons bandwidths by the world's size in any group; and says nothing by itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

_MESSAGES = ("isend", "irecv", "batch_isend_irecv")


class CallLog:
    """Adds up DeepSpeed's calls by name and size. `reset_timer` is called with the name of each that is noted."""

    prof_all, verbose = True, False
    prof_ops: tuple[str, ...] = ()

    def __init__(self, reset_timer: Callable[[str], None]) -> None:
        self.enabled = self.debug = False
        self._reset_timer = reset_timer
        self._calls: dict[tuple[str, int], tuple[int, float]] = {}
        self._lock = threading.Lock()

    def configure(self, config: Any) -> None:
        """Begin anew, as the JSON's `comms_logger` says. DeepSpeed calls it where there is one."""
        self.forget()
        self.enabled = config.comms_logger_enabled
        self.debug = config.comms_logger.debug

    def append(self, function: str, name: str, milliseconds: float, size: int) -> None:
        """Take in one call of `size` bytes. DeepSpeed calls it after each, on any thread."""
        with self._lock:
            calls, total = self._calls.get((name, size), (0, 0.0))
            self._calls[name, size] = calls + 1, total + milliseconds
        self._reset_timer(name)

    def forget(self) -> None:
        """Drop the calls so far."""
        self._calls.clear()

    def table(self) -> list[str]:
        """Return the calls so far in lines with a head, those that took longest first."""
        head = f"{'call of DeepSpeed':<28} {'bytes a call':>14} {'calls':>8} {'total ms':>12} {'mean ms':>10}"
        rows = sorted(self._calls.items(), key=lambda row: -row[1][1])
        return [head, *(_row(name, size, calls, total) for (name, size), (calls, total) in rows)]


def _row(name: str, size: int, calls: int, total: float) -> str:
    return f"{name:<28} {size:>14,} {calls:>8,} {total:>12,.2f} {total / calls:>10,.3f}"


def wait_for_each_call(backend: Any) -> None:
    """Have the collectives of DeepSpeed's backend return once they are over, so that the time of a call is theirs.

    Messages between two ranks may need each other; stages 1 to 3 send none.
    """
    for name, method in _methods(backend):
        setattr(backend, name, _waiting(method))


def _methods(backend: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in vars(type(backend)):
        method = getattr(backend, name)
        if not name.startswith("_") and callable(method) and name not in _MESSAGES:
            yield name, method


def _waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def waited(*args: Any, **options: Any) -> Any:
        handle = call(*args, **options)
        if hasattr(handle, "wait"):
            handle.wait()
        return handle

    return waited
