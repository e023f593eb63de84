"""What all tests share: one thread a process, interpreted kernels without a GPU, workers that are started once."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the machine's cores belong to the ranks

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported: triton decides then
    from tests.interpreter import repair_bf16

    repair_bf16()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's job in the background; the programs that tests start and interrupt would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.worker_pool import WorkerPool

POOL_SIZE = 8
ALONE = {"preflight", "watchdog", "distributed/test_launch.py", "launch/test_local.py", "test_worker_pool.py"}
"""Directories and files whose tests need the machine for themselves; so do those marked as flaky, by themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what must run alone; with a GPU all tests of kernels run on it, and `-m gpu` takes them in."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent)
        place = file.parts[0]
        if {place, file.as_posix()} & ALONE or item.get_closest_marker("flaky"):
            item.add_marker(pytest.mark.alone)
        if torch.cuda.is_available() and place == "kernels" and item.path.name != "test_compile.py":
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish() -> None:
    """Take what imports and collecting have made out of the garbage collector's sight, which reads all it sees."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Give the session's pool of up to 8 ranks; its processes start when a test first needs them."""
    workers = WorkerPool(POOL_SIZE)
    yield workers
    workers.close()


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Give this process its signals back: `megalm train`, called in it, keeps them to itself until the process ends."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
