"""What is kept beside the optimizer's own state: frozen weights, and the average of those that are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from tests.parity.harness import VOCAB, RandomText, build_trainer
from tests.parity.reference import Reference
from tests.shards import assert_close
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell, assert_equal, check_cells, check_resume, held_weights, run_steps, saved

FREEZE: dict[str, Any] = {
    "optim.rules": [{"match": "blocks.0.attention.*", "freeze": True}, {"match": "embedding.weight", "freeze": True}]
}
FROZEN_STAGE: dict[str, Any] = {
    "optim.rules": [{"match": word, "freeze": True} for word in ("blocks.0.*", "embedding.*", "position.*")]
}
AVERAGE: dict[str, Any] = {"optim.ema_decay": 0.6}
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
LAYOUTS = (RankLayout(data=2), RankLayout(data=2, tensor=2), RankLayout(pipeline=2, data=2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kept", [{**FREEZE, **AVERAGE}, AVERAGE], ids=["frozen", "trained"])
def test_frozen_weights_and_averages_resume_bit_for_bit(
    pool: WorkerPool, layout: RankLayout, kept: dict[str, Any]
) -> None:
    engines = ENGINES if layout.pipeline == 1 else ENGINES[:3]
    pool.run(check_cells, check_resume, [Cell(zero, "bf16") for zero in engines], 1, kept, layout=layout)


def test_a_stage_without_anything_to_train_resumes_too(pool: WorkerPool) -> None:
    layout = RankLayout(pipeline=2, data=2)
    pool.run(check_resume, Cell("zero0", "bf16"), 1, {**FROZEN_STAGE, **AVERAGE}, layout=layout)


def test_a_copy_of_an_untied_embedding_resumes_bit_for_bit(pool: WorkerPool) -> None:
    """Where further tokens are predicted the last stage embeds them."""
    untied = {"model.tie_embeddings": False, "model.mtp_depth": 1, "model.position": "rotary", "model.kv_rank": 6}
    cells = [Cell(zero, precision) for zero in ENGINES[:3] for precision in ("bf16", "fp32")]
    pool.run(check_cells, check_resume, cells, 1, untied, layout=RankLayout(pipeline=2, data=2))


def check_against_formula(mesh: ParallelMesh, cell: Cell) -> None:
    config = cell.config(mesh, **FREEZE, **AVERAGE)
    trainer = build_trainer(mesh, config)
    reference = Reference(config, VOCAB, torch.float64)
    before = saved(trainer).wholes
    text = RandomText(VOCAB, config, 0, 1)
    for step in range(3):
        batch = text.batch(step * config.train.global_batch, *[config.train.global_batch] * 2)
        reference.train_step((batch.tokens_BT, batch.labels_BT, batch.loss_mask_BT), step)
    run_steps(trainer, 3)
    store = saved(trainer)
    for name in reference.parameters:
        stays = torch.equal(store.wholes[name, "weight"], before[name, "weight"])
        assert stays == (name not in reference.trained()), name
    for name, average in reference.averages.items():
        if not name.endswith("qkv.bias"):  # a key bias has no gradient but rounding, which AdamW makes full steps
            found = store.wholes[name, "ema"].view_as(average)
            assert_close(found, average, f"average of {name}", limit=1e-9)
            assert not torch.equal(found, store.wholes[name, "weight"].view_as(average)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_frozen_weights_stay_and_averages_are_those_of_the_formula(pool: WorkerPool, layout: RankLayout) -> None:
    engines = ENGINES if layout.pipeline == 1 else ENGINES[:3]
    pool.run(check_cells, check_against_formula, [Cell(zero, "fp64") for zero in engines], layout=layout)


def check_exchange(mesh: ParallelMesh, cell: Cell) -> None:
    trainer = build_trainer(mesh, cell.config(mesh, **AVERAGE))
    run_steps(trainer, 2)
    store, weights = saved(trainer), held_weights(trainer)
    with trainer.engine.averaged_weights():
        inside = saved(trainer)
        assert not all(torch.equal(a, b) for a, b in zip(weights, held_weights(trainer), strict=True))
        for name in {name for name, _ in store.shapes}:
            assert torch.equal(inside.wholes[name, "weight"], store.wholes[name, "ema"]), name
    store.assert_same(saved(trainer))
    assert_equal(weights, held_weights(trainer))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_averaged_weights_can_be_used_and_put_back(pool: WorkerPool, precision: str) -> None:
    cells = [Cell(zero, precision) for zero in ENGINES]
    pool.run(check_cells, check_exchange, cells, layout=RankLayout(data=2))
