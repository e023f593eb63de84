"""What all engines promise: whole states, resuming bit for bit, steps left out where gradients are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.train.trainer import TrainState
from tests.parity.harness import build_trainer
from tests.shards import Store, assert_close
from tests.worker_pool import WorkerPool
from tests.zero.runs import OTHERS, PLACED, STEPS, Cell, check_cells, check_resume, check_skipped, run_steps, saved

ENGINES = ("zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload")


@pytest.mark.parametrize("zero", ENGINES)
def test_two_data_ranks_resume_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    """All ranks' fragments tile every logical tensor once; three steps after a load equal the unbroken run's."""
    cells = [Cell(zero, precision, kind) for precision in ("fp32", "bf16") for kind in ("adamw", "sgd")]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(data=2))


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_every_optimizer_resumes_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    pool.run(check_cells, check_resume, [Cell(zero, "fp32", kind) for kind in OTHERS], layout=RankLayout(data=2))


@pytest.mark.parametrize("zero", ENGINES)
def test_optimizers_that_know_their_parameters_resume_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    cells = [Cell(zero, precision, kind) for precision in ("fp32", "bf16") for kind in PLACED]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(data=2))
    average = {"optim.ema_decay": 0.6}
    pool.run(check_cells, check_resume, cells[:2], 1, average, layout=RankLayout(data=2, tensor=2))
    if zero in ("zero0", "zero1"):
        pool.run(check_cells, check_resume, cells[:2], layout=RankLayout(pipeline=2, data=2))


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_the_two_stages_of_a_tied_weight_stay_alike(pool: WorkerPool, zero: str) -> None:
    """Among three data ranks the order of a sum shows, and where in memory the weight lies."""
    cells = [Cell(zero, "fp32", kind) for kind in ("adamw", "sgd", "adafactor", "muon", "narrow adamw")]
    layout = RankLayout(pipeline=2, data=3)
    pool.run(check_cells, check_tied, cells, {"model.hidden": 32, "model.ffn": 4}, layout=layout)
    cut_in_a_row = {"model.hidden": 38, "model.kv_heads": 1, "model.ffn": 1, "optim.centralize": True}
    pool.run(check_cells, check_tied, cells[:1], cut_in_a_row, layout=layout)


def check_tied(mesh: ParallelMesh, cell: Cell, overrides: dict[str, Any]) -> None:
    trainer = build_trainer(mesh, cell.config(mesh, **{"train.global_batch": 6, **overrides}))
    run_steps(trainer, 20)
    weight: Any = trainer.engine.module.tied_weight
    assert weight is not None and mesh.size("embedding") == 2
    copies = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(copies, weight.detach(), group=mesh.group("embedding"))
    assert torch.equal(*copies), f"{int((copies[0] != copies[1]).sum())} of {weight.numel()} differ"


def test_eight_bits_resume_bit_for_bit(pool: WorkerPool) -> None:
    average = {"optim.ema_decay": 0.6}
    pool.run(check_cells, check_resume, [Cell("zero0", "bf16", "adamw8bit")], 1, average, layout=RankLayout(data=2))


@pytest.mark.parametrize("layout", [RankLayout(data=2), RankLayout(tensor=2), RankLayout(pipeline=2, data=2)], ids=str)
def test_a_narrow_state_is_rounded_alike_in_every_layout(pool: WorkerPool, layout: RankLayout) -> None:
    """In float64, where the layouts' gradients differ by 1e-16, the same bits are kept."""
    (alone,) = pool.run(steps_of, "zero0", layout=RankLayout())
    for zero in ("zero0", "zero1", "zero2", *(["zero3"] if layout.pipeline == 1 else [])):
        store = pool.run(steps_of, zero, layout=layout)[0]
        assert store.wholes.keys() == alone.wholes.keys()
        for (name, kind), whole in alone.wholes.items():
            found = store.wholes[name, kind]
            if kind == "weight":
                assert_close(found, whole, f"{zero}: {name}", limit=1e-10)
            else:
                assert whole.dtype is torch.bfloat16 and torch.equal(found, whole), f"{zero}: {kind} of {name}"


def steps_of(mesh: ParallelMesh, zero: str) -> Store:
    """Return what is saved after some steps without dropout; a key's bias, whose gradient is rounding, is frozen."""
    rules = [{"match": "*.qkv.bias", "freeze": True}]
    overrides = {"model.layers": 2, "model.dropout": 0.0, "optim.rules": rules, "train.global_batch": 4}
    trainer = build_trainer(mesh, Cell(zero, "fp64", "narrow adamw").config(mesh, **overrides))
    run_steps(trainer, 3)
    return saved(trainer)


@pytest.mark.parametrize("layout", [RankLayout(), RankLayout(pipeline=2, data=2), RankLayout(data=3)], ids=str)
def test_muons_momentum_is_loaded_in_any_layout(pool: WorkerPool, layout: RankLayout) -> None:
    """Saved by two tensor and two data ranks under ZeRO 2; what follows is what follows there."""
    store, expected = pool.run(go_on, None, "zero2", layout=RankLayout(data=2, tensor=2))[0]
    for zero in ("zero0", "zero1") if layout.pipeline > 1 else ("zero0", "zero1", "zero3"):
        _, found = pool.run(go_on, store, zero, layout=layout)[0]
        assert found == pytest.approx(expected, rel=1e-12), zero


def go_on(mesh: ParallelMesh, store: Store | None, zero: str) -> tuple[Store, list[float]]:
    """Return what is saved after some steps, or that which is loaded instead, and the losses of those that follow."""
    overrides = {"model.layers": 3, "model.dropout": 0.0, "train.global_batch": 6, "train.clip_grad_norm": None}
    trainer = build_trainer(mesh, Cell(zero, "fp64", "muon").config(mesh, **overrides))
    if store is None:
        run_steps(trainer, STEPS)
        store = saved(trainer)
    else:
        trainer.engine.load(store.read, sorted(store.kinds() - {"weight"}), STEPS)
        trainer.state = TrainState(step=STEPS, samples=STEPS * 6)
    return store, run_steps(trainer, 3)[::2]


def check_skipped_cells(mesh: ParallelMesh, zero: str) -> None:
    check_cells(mesh, check_skipped, [Cell(zero, "fp32"), Cell(zero, "fp32", "muon")], math.inf)
    check_cells(mesh, check_skipped, [Cell(zero, "bf16", "sgd")], math.nan)
    check_cells(mesh, check_skipped, [Cell(zero, "fp32", "sgd")], 1e25)
    check_cells(mesh, check_skipped, [Cell(zero, "fp32"), Cell(zero, "bf16", "sgd")], None)


@pytest.mark.parametrize("zero", ENGINES)
def test_a_non_finite_gradient_on_one_data_rank_leaves_weights_and_state_as_they_were(
    pool: WorkerPool, zero: str
) -> None:
    pool.run(check_skipped_cells, zero, layout=RankLayout(data=2))
