"""Worlds of DeepSpeed that follow one another in the same processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.cases import SEQUENCE, misses, zero
from tests.parity.harness import Case, run_case
from tests.worker_pool import WorkerPool


@pytest.fixture
def young_pool() -> Iterator[WorkerPool]:
    """Give workers that have not been in any world yet."""
    workers = WorkerPool(4)
    yield workers
    workers.close()


def test_ranks_of_another_past_compute_the_same(young_pool: WorkerPool) -> None:
    """The first two ranks have been in worlds of stage 3 before, the other two have not."""
    run_case(young_pool, Case(1, 2, 1, zero(3)), 1)
    for case in (Case(1, 2, 2, {**zero(2), **SEQUENCE}), Case(1, 2, 2, zero(3))):
        difference, _ = run_case(young_pool, case, 2)
        assert not misses(difference, "fp64"), case.name
