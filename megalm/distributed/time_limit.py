"""Work that may hang, waited for in bounded time. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """Return work()'s result or raise its error; TimeoutError if it takes longer, while it goes on in its thread.

    Calls into torch, or into a file system that hangs, cannot be interrupted. The thread is a daemon, so it does not
    keep the process alive.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, limit_s))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not done within {limit_s:.0f} s")
    return results[0]
