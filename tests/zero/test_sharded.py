"""DeepSpeed's stages against the plain engine, and resumed under tensor and pipeline parallelism."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.zero.sharded import ShardedEngine
from tests.parity.harness import build_trainer
from tests.shards import Store, assert_close
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell, check_cells, check_resume, run_steps, saved


def trained(mesh: ParallelMesh, cell: Cell) -> tuple[list[float], Store]:
    # DeepSpeed takes its norm in fp32, also under fp64: without clipping it touches nothing but the report.
    trainer = build_trainer(mesh, cell.config(mesh, **{"train.clip_grad_norm": None}))
    return run_steps(trainer, 3), saved(trainer)


def check_against_plain(mesh: ParallelMesh, cells: list[str]) -> None:
    figures, store = trained(mesh, Cell("zero0", "fp64"))
    for zero in cells:
        found, other = trained(mesh, Cell(zero, "fp64"))
        assert found[::2] == pytest.approx(figures[::2], rel=1e-12), zero
        assert found[1::2] == pytest.approx(figures[1::2], rel=1e-5), zero
        assert store.wholes.keys() == other.wholes.keys(), zero
        for (name, kind), whole in store.wholes.items():
            if not name.endswith("qkv.bias"):  # a key bias has no gradient but rounding, which AdamW makes full steps
                assert_close(other.wholes[name, kind], whole, f"{zero}: {kind} of {name}", limit=1e-10)


def test_every_stage_makes_the_weights_and_moments_of_the_plain_engine(pool: WorkerPool) -> None:
    pool.run(check_against_plain, ["zero1", "zero2", "zero3"], layout=RankLayout(data=2))


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_tensor_pipeline_and_data_together_resume_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    cells = [Cell(zero, "bf16"), Cell(zero, "fp32", "sgd")]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(pipeline=2, data=2, tensor=2))


def test_an_engine_that_has_made_no_step_resumes_bit_for_bit(pool: WorkerPool) -> None:
    """What happens after a restart: state is made by the load, not by a first step."""
    cells = [*(Cell(f"zero{stage}", "bf16") for stage in range(4)), Cell("zero3", "fp32", "sgd")]
    pool.run(check_cells, check_resume, cells, 0, layout=RankLayout(data=2))


def check_gradients_are_a_partition(mesh: ParallelMesh) -> None:
    for stage in (1, 2, 3):
        engine = build_trainer(mesh, Cell(f"zero{stage}", "fp32").config(mesh)).engine
        assert isinstance(engine, ShardedEngine)
        own = sum(piece.length for piece in engine.pieces)
        whole = sum(math.prod(p.shard.local_shape) for p in engine.parameters)  # type: ignore[attr-defined]
        assert 0.4 * whole <= own <= 0.6 * whole, f"stage {stage}: {own} of {whole}"


def test_a_data_rank_owns_about_its_share_of_the_elements(pool: WorkerPool) -> None:
    pool.run(check_gradients_are_a_partition, layout=RankLayout(data=2))


def check_dtypes(mesh: ParallelMesh) -> None:
    for precision, weights, masters in (
        ("bf16", torch.bfloat16, torch.float32),
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ):
        for stage in (1, 2, 3):
            trainer = build_trainer(mesh, Cell(f"zero{stage}", precision).config(mesh))
            engine = trainer.engine
            assert isinstance(engine, ShardedEngine)
            seen: list[torch.dtype] = []
            reduce = engine.reduce

            def look(engine: ShardedEngine = engine, reduce=reduce, seen=seen) -> None:  # type: ignore[no-untyped-def]
                reduce()
                seen.extend({fragment.values.dtype for fragment in engine.gradients()})

            engine.reduce = look  # type: ignore[method-assign]
            trainer.train_step()
            assert {p.dtype for p in engine.parameters} == {weights}
            assert seen == [masters], f"stage {stage} {precision}: gradients in {seen}"
            assert {f.values.dtype for f in engine.state()} == {masters}


def test_gradients_and_masters_are_never_narrower_than_fp32(pool: WorkerPool) -> None:
    pool.run(check_dtypes, layout=RankLayout(data=2))
