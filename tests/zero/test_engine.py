"""What all engines promise: whole states, resuming bit for bit, steps left out where gradients are not finite."""

from __future__ import annotations

import math

import pytest

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from tests.worker_pool import WorkerPool
from tests.zero.runs import OTHERS, Cell, check_cells, check_resume, check_skipped

ENGINES = ("zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload")


@pytest.mark.parametrize("zero", ENGINES)
def test_two_data_ranks_resume_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    """All ranks' fragments tile every logical tensor once; three steps after a load equal the unbroken run's."""
    cells = [Cell(zero, precision, kind) for precision in ("fp32", "bf16") for kind in ("adamw", "sgd")]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(data=2))


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_every_optimizer_resumes_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    pool.run(check_cells, check_resume, [Cell(zero, "fp32", kind) for kind in OTHERS], layout=RankLayout(data=2))


def check_skipped_cells(mesh: ParallelMesh, zero: str) -> None:
    check_cells(mesh, check_skipped, [Cell(zero, "fp32")], math.inf)
    check_cells(mesh, check_skipped, [Cell(zero, "bf16", "sgd")], math.nan)
    check_cells(mesh, check_skipped, [Cell(zero, "fp32", "sgd")], 1e25)
    check_cells(mesh, check_skipped, [Cell(zero, "fp32"), Cell(zero, "bf16", "sgd")], None)


@pytest.mark.parametrize("zero", ENGINES)
def test_a_non_finite_gradient_on_one_data_rank_leaves_weights_and_state_as_they_were(
    pool: WorkerPool, zero: str
) -> None:
    pool.run(check_skipped_cells, zero, layout=RankLayout(data=2))
