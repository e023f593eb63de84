"""The parity gate can fail: planted faults are caught."""

from __future__ import annotations

import pytest

from tests.parity.mutants import MUTANTS, REPRESENTATIVE, verdict
from tests.worker_pool import WorkerPool


@pytest.mark.parametrize("place", REPRESENTATIVE, ids=lambda place: MUTANTS[place].plant.__name__)
def test_planted_fault_is_caught(pool: WorkerPool, place: int) -> None:
    assert verdict(pool, place)


def test_faults_are_many_and_different() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15
