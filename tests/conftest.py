"""What all tests share: one thread a process, interpreted kernels without a GPU, workers that are started once."""

from __future__ import annotations

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

from tests.worker_pool import WorkerPool

POOL_SIZE = 8
SIDE_BY_SIDE = {
    *("checkpoint", "config", "data", "dry_run", "evaluation", "generation", "kernels", "launch", "models", "nn"),
    *("pipeline_parallel", "tensor_parallel"),
}
"""Directories whose tests, but for those with a pool, keep to one core each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what may run side by side; with a GPU all tests of kernels run on it, and `-m gpu` takes them in."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).parts[0]
        if place in SIDE_BY_SIDE and "pool" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.side_by_side)
        if torch.cuda.is_available() and place == "kernels" and item.path.name != "test_compile.py":
            item.add_marker(pytest.mark.gpu)


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
