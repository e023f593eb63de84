"""The plain engine: sums over data ranks and tied stages, clipping by the whole model's norm, bf16 masters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.zero import replicated
from megalm.zero.engine import shard_of
from megalm.zero.replicated import ReplicatedEngine
from tests.parity.harness import build_trainer
from tests.shards import assert_close
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell, check_cells, check_resume, run_steps, saved


def engine_of(mesh: ParallelMesh, precision: str = "fp64", **overrides: object) -> ReplicatedEngine:
    engine = build_trainer(mesh, Cell("zero0", precision, "sgd").config(mesh, **overrides)).engine
    assert isinstance(engine, ReplicatedEngine)
    return engine


def give_gradients(engine: ReplicatedEngine, size: float) -> None:
    for weight in engine.weights:
        weight.grad = torch.full_like(weight, size)


def check_sums(mesh: ParallelMesh, elements: int) -> None:
    """Rank r gives gradients r + 1: the data ranks' sum comes back, and for tied weights that of both stages."""
    replicated.BUCKET_ELEMENTS, kept = elements, replicated.BUCKET_ELEMENTS
    try:
        engine = engine_of(mesh)
        give_gradients(engine, mesh.rank + 1.0)
        engine.reduce()
    finally:
        replicated.BUCKET_ELEMENTS = kept
    layout, at = mesh.layout, mesh.coordinates
    plain = sum(layout.rank(at.pipeline, data) + 1.0 for data in range(layout.data))
    tied = sum(layout.rank(stage, data) + 1.0 for stage in range(layout.pipeline) for data in range(layout.data))
    names = set()
    for fragment in engine.gradients():
        expected = tied if fragment.shard.name == "embedding.weight" and layout.pipeline > 1 else plain
        assert (fragment.values == expected).all(), fragment.shard.name
        names.add(fragment.shard.name)
    assert names == {shard_of(weight).name for weight in engine.weights}


@pytest.mark.parametrize("elements", [1, 200, 2**25])
def test_gradients_are_summed_over_data_ranks_and_tied_ones_over_both_stages_too(
    pool: WorkerPool, elements: int
) -> None:
    pool.run(check_sums, elements, layout=RankLayout(pipeline=2, data=2))


def check_norm_and_clipping(mesh: ParallelMesh) -> tuple[float, float]:
    """All gradients are 1, so the norm is the root of the number of logical elements; SGD then moves by lr."""
    moved = []
    for clip in (1.0, None):
        engine = engine_of(mesh, **{"train.clip_grad_norm": clip, "optim.weight_decay": 0.0})
        before = [weight.detach().clone() for weight in engine.weights]
        for weight in engine.weights:
            spec = shard_of(weight)
            weight.grad = torch.zeros_like(weight)
            weight.grad.narrow(spec.dim or 0, 0, spec.length if spec.dim is not None else len(weight)).fill_(1.0)
        norm = engine.update(lr=0.5)
        assert all(weight.grad is None for weight in engine.weights)
        factor = 1.0 if clip is None else clip / (norm + 1e-6)
        for old, weight in zip(before, engine.weights, strict=True):
            spec = shard_of(weight)
            step = (old - weight.detach()).narrow(spec.dim or 0, 0, spec.length if spec.dim is not None else len(old))
            assert_close(step, torch.full_like(step, 0.5 * factor))
        moved.append(norm)
    elements = {name: len(whole) for (name, kind), whole in saved_shapes(mesh).items() if kind == "weight"}
    assert moved == pytest.approx([math.sqrt(sum(elements.values()))] * 2, rel=1e-14)
    return moved[0], moved[1]


def saved_shapes(mesh: ParallelMesh) -> dict[tuple[str, str], torch.Tensor]:
    return saved(build_trainer(mesh, Cell("zero0", "fp64", "sgd").config(mesh))).wholes


def test_the_norm_counts_every_logical_element_once_and_clipping_scales_by_it(pool: WorkerPool) -> None:
    layouts = (RankLayout(pipeline=2), RankLayout(pipeline=2, tensor=2))
    norms = [norm for layout in layouts for pair in pool.run(check_norm_and_clipping, layout=layout) for norm in pair]
    assert len(set(norms)) == 1


def check_small_gradients_are_not_scaled(mesh: ParallelMesh) -> None:
    engine = engine_of(mesh, **{"train.clip_grad_norm": 1.0, "optim.weight_decay": 0.0})
    before = engine.weights[0].detach().clone()
    give_gradients(engine, 1e-6)
    assert engine.update(lr=1.0) < 1.0
    assert_close(before - engine.weights[0].detach(), torch.full_like(before, 1e-6), limit=1e-9)


def check_bf16(mesh: ParallelMesh) -> None:
    """256 + 1 has no bf16: a sum in bf16 would lose every later microbatch; so would weights without masters."""
    engine = engine_of(mesh, "bf16", **{"train.clip_grad_norm": None, "optim.weight_decay": 0.0})
    for size in (256.0, 1.0, 1.0):
        give_gradients(engine, size)
        engine.microbatch_done()
        assert all(weight.grad is None for weight in engine.weights)
    engine.reduce()
    for fragment in engine.gradients():
        assert fragment.values.dtype is torch.float32 and (fragment.values == 258.0).all()
    masters = [master.clone() for master in engine.masters]
    engine.update(lr=1e-9)
    for master, new, weight in zip(masters, engine.masters, engine.weights, strict=True):
        assert new.dtype is torch.float32 and weight.dtype is torch.bfloat16
        assert torch.equal(weight.detach(), new.bfloat16())
        assert torch.equal(new, master - 1e-9 * torch.full_like(master, 258.0))


def check_bytes(mesh: ParallelMesh) -> None:
    for precision, width in (("fp32", 4), ("bf16", 2)):
        trainer = build_trainer(mesh, Cell("zero0", precision).config(mesh))
        run_steps(trainer, 1)
        engine = trainer.engine
        assert isinstance(engine, ReplicatedEngine)
        elements = sum(weight.numel() for weight in engine.weights)
        give_gradients(engine, 1.0)
        engine.microbatch_done()
        held = engine.held_bytes()
        assert (held.weights, held.gradients, held.optimizer) == (width * elements, 4 * elements, 8 * elements)
        assert held.master_weights == (4 * elements if precision == "bf16" else 0)


def check_one_rank(mesh: ParallelMesh) -> None:
    check_small_gradients_are_not_scaled(mesh)
    check_bf16(mesh)
    check_bytes(mesh)


def test_small_gradients_are_left_alone_bf16_adds_up_in_fp32_and_bytes_are_counted(pool: WorkerPool) -> None:
    pool.run(check_one_rank, layout=RankLayout())


def check_same_weights_on_data_ranks(mesh: ParallelMesh) -> None:
    trainer = build_trainer(mesh, Cell("zero0", "bf16").config(mesh))
    run_steps(trainer, 2)
    for parameter in trainer.engine.module.parameters():
        copies = [torch.empty_like(parameter.detach()) for _ in range(mesh.size("data"))]
        dist.all_gather(copies, parameter.detach(), group=mesh.group("data"))
        assert all(torch.equal(copies[0], copy) for copy in copies)


def test_data_ranks_keep_the_same_weights(pool: WorkerPool) -> None:
    pool.run(check_same_weights_on_data_ranks, layout=RankLayout(data=2))


def test_tensor_pipeline_and_data_together_resume_bit_for_bit(pool: WorkerPool) -> None:
    cells = [Cell("zero0", "bf16"), Cell("zero0", "fp32", "sgd")]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(pipeline=2, data=2, tensor=2))
