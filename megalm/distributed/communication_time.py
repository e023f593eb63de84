"""How long a rank stands in torch.distributed: in collectives and messages, its own work's and DeepSpeed's alike.

On a CPU that is the time inside the calls. On CUDA it is the time that the calling stream spends between the events
before and after a call: what computation waits for, and what DeepSpeed does on streams of its own. The events are read
when they have passed, so that nothing waits for the device. A rank that is slow waits least: the others wait for it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megalm.distributed.progress import progress

_CALLS = (
    *("all_reduce", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv"),
    *("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_to_all", "all_to_all_single", "batch_isend_irecv"),
)


class CommunicationClock:
    """Adds up the time of communication while it is entered.

    torch.distributed has no hook for that, so its functions, which this package and DeepSpeed call as its attributes,
    and the wait for a handle are wrapped. Of nested calls the outermost counts; one in another thread (the backward
    pass on CUDA) counts like one in this.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._inside = threading.local()
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []

    def __enter__(self) -> CommunicationClock:
        for owner, name in ((dist.Work, "wait"), *((dist, name) for name in _CALLS)):
            original = getattr(owner, name)
            self._originals.append((owner, name, original))
            setattr(owner, name, self._timed(original))
        return self

    def __exit__(self, *_: object) -> None:
        while self._originals:
            setattr(*self._originals.pop())

    def take(self) -> float:
        """Return the seconds since the last call of this; those that the device has not reached yet come later."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            if getattr(self._inside, "call", False):
                return call(*args, **options)
            with self._counted(), progress.doing("communication", call.__name__):
                return call(*args, **options)

        return timed

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._inside.call = True
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._inside.call = False
            if self._cuda:
                end.record()
                self._events.append((begin, end))
            else:
                self._seconds += time.perf_counter() - start
