"""Which engine a recipe gets."""

from __future__ import annotations

import sys

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from tests.parity.harness import build_trainer
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell


def check_engines(mesh: ParallelMesh) -> None:
    kept = sys.modules.pop("megalm.zero.sharded", None)
    plain = build_trainer(mesh, Cell("zero0", "fp32").config(mesh, **{"train.clip_grad_norm": 0.7})).engine
    assert type(plain).__name__ == "ReplicatedEngine" and plain.loss_factor == 1.0
    assert plain.clip_norm == 0.7  # type: ignore[attr-defined]
    assert "megalm.zero.sharded" not in sys.modules, "stage 0 imports DeepSpeed"
    if kept is not None:
        sys.modules["megalm.zero.sharded"] = kept
    for name, stage, offloaded in (("zero1", 1, False), ("zero2-offload", 2, True), ("zero3", 3, False)):
        engine = build_trainer(mesh, Cell(name, "fp32").config(mesh, **{"train.clip_grad_norm": 0.7})).engine
        assert type(engine).__name__ == "ShardedEngine"
        assert engine.stage == stage and engine.offloaded == offloaded  # type: ignore[attr-defined]
        assert engine.loss_factor == mesh.size("data")
        assert engine.optimizer.clip_grad == 0.7  # type: ignore[attr-defined]


def test_stage_0_does_without_deepspeed_and_the_others_take_stage_clipping_and_json(pool: WorkerPool) -> None:
    pool.run(check_engines, layout=RankLayout(data=2))
