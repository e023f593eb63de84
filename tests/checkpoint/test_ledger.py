"""No sample is repeated or skipped, however often a run resumes and in whatever layouts; `make ledger` for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.train.trainer import Trainer
from tests.checkpoint.ledger import broken_promises, run
from tests.worker_pool import WorkerPool


@pytest.mark.slow
def test_each_sample_is_used_once_an_epoch_over_resumes_in_other_layouts(pool: WorkerPool, tmp_path: Path) -> None:
    result = run(pool, tmp_path, resumes=6, windows=23, seed=3)
    assert result.wrong == [] and result.epochs >= 2.0
    assert len(result.starts) >= 4 and result.again >= 2


def forget_a_sample(trainer: Trainer) -> None:
    trainer.state.samples += trainer.state.step > 0


def test_a_resume_that_forgets_a_sample_is_found_out(pool: WorkerPool, tmp_path: Path) -> None:
    result = run(pool, tmp_path, resumes=1, windows=11, seed=3, fault=forget_a_sample)
    assert any("missing" in line for line in result.wrong)


def test_the_ledger_sees_a_repeated_window_and_another_order() -> None:
    assert any("missing" in line for line in broken_promises({1: [0, 0], 2: [1, 0]}, 2))
    assert broken_promises({1: [1, 0, 1, 0], 2: [0, 1, 0, 1]}, 4) != []
