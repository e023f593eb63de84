"""Experts that ranks divide, under each engine that may: saved whole, resumed to the bit, read by any other layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import CorruptionError
from megalm.train.replicas import compare
from megalm.zero.engine import kept_buffers, replicas_of, shard_of
from tests.parity.harness import build_trainer
from tests.shards import Store
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell, check_cells, check_resume, run_steps, saved

EXPERTS: dict[str, Any] = {
    "model.experts": 4,
    "model.expert_ffn": 6,
    "model.router_bias_rate": 0.01,
    "model.shared_experts": 1,
}
DIVIDED: dict[str, Any] = {**EXPERTS, "parallel.expert": 2}


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (4, 1), (2, 2)])
def test_a_run_with_divided_experts_resumes_to_the_bit(pool: WorkerPool, data: int, tensor: int) -> None:
    cells = [Cell("zero0", "fp64"), Cell("zero1", "fp64", "sgd"), Cell("zero2", "fp64"), Cell("zero2", "bf16")]
    layout = RankLayout(data=data, tensor=tensor, expert=2)
    pool.run(check_cells, check_resume, cells, 1, DIVIDED, layout=layout, timeout_s=240.0)


def test_routers_biases_belong_to_checkpoints_under_every_stage(pool: WorkerPool) -> None:
    cells = [Cell(f"zero{stage}", precision) for stage in range(4) for precision in ("fp32", "bf16")]
    pool.run(check_cells, check_resume, cells, 1, EXPERTS, layout=RankLayout(data=2), timeout_s=240.0)


def trained_and_saved(mesh: ParallelMesh, zero: str, values: dict[str, Any]) -> Store:
    trainer = build_trainer(mesh, Cell(zero, "fp64").config(mesh, **{"model.layers": 2, **values}))
    run_steps(trainer, 2)
    biases = kept_buffers(trainer.engine.module)
    assert biases and all(bias.any() for bias in biases)
    return saved(trainer)


def check_loads(mesh: ParallelMesh, zero: str, values: dict[str, Any], store: Store) -> None:
    trainer = build_trainer(mesh, Cell(zero, "fp64").config(mesh, **{"model.layers": 2, "seed": 5, **values}))
    trainer.engine.load(store.read, sorted(store.kinds() - {"weight"}), 2)
    store.assert_same(saved(trainer))


def test_any_layout_of_experts_goes_on_from_any_other(pool: WorkerPool) -> None:
    layouts = [
        (RankLayout(data=2, expert=2), "zero0", DIVIDED),
        (RankLayout(data=4, expert=4), "zero2", {**DIVIDED, "parallel.expert": 4}),
        (RankLayout(pipeline=2, data=2, tensor=2, expert=2), "zero1", DIVIDED),
        (RankLayout(data=2), "zero3", EXPERTS),
        (RankLayout(tensor=2), "zero0", EXPERTS),
    ]
    for layout, zero, values in layouts[:2]:
        store = pool.run(trained_and_saved, zero, values, layout=layout)[0]
        for other, other_zero, other_values in layouts:
            pool.run(check_loads, other_zero, other_values, store, layout=other, timeout_s=120.0)


def check_replicas(mesh: ParallelMesh) -> None:
    """Ranks with other experts differ, and are no replicas; one with the same that differs is named."""
    trainer = build_trainer(mesh, Cell("zero0", "fp64").config(mesh, **DIVIDED))
    run_steps(trainer, 1)
    compare(trainer)
    experts = [p for p in trainer.engine.module.parameters() if replicas_of(shard_of(p)) == "expert_replica"]
    if mesh.rank == 3:
        with torch.no_grad():
            experts[0].view(-1)[0] += 1.0
    with pytest.raises(CorruptionError, match=r"rank 1 on \S+ and rank 3 on \S+ in the weight \S*experts"):
        compare(trainer)


def test_experts_are_compared_among_the_ranks_that_hold_the_same(pool: WorkerPool) -> None:
    pool.run(check_replicas, layout=RankLayout(data=4, expert=2))
