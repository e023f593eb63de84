"""What a step's routers saw, and how their biases move: the same in every layout, and what the formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from tests.parity.harness import DTYPES, VOCAB, Case, RandomText, build_trainer
from tests.parity.options import BALANCED, FULL
from tests.parity.reference import Reference
from tests.worker_pool import WorkerPool

RECIPE: dict[str, Any] = {**BALANCED, **FULL, "model.experts": 4, "train.recompute": "full"}
LAYOUTS = (
    Case(1, 1, 1, RECIPE),
    Case(1, 1, 2, {**RECIPE, "parallel.sequence": True}),
    Case(2, 2, 1, {**RECIPE, "parallel.expert": 2}),
)


def steps_of(mesh: ParallelMesh, case: Case, steps: int) -> tuple[dict[str, float], dict[int, list[float]]]:
    """Return the last step's metrics, and the biases of this stage's layers."""
    trainer = build_trainer(mesh, case.config())
    for _ in range(steps):
        trainer.train_step()
    biases = {
        layer: router.bias.tolist() for layer, router in trainer.experts.routers.items() if router.bias is not None
    }
    return trainer.experts.record(), biases


def expected(steps: int) -> tuple[dict[str, float], dict[int, list[float]]]:
    config = LAYOUTS[0].config()
    reference = Reference(config, VOCAB, DTYPES["fp64"])
    text, size = RandomText(VOCAB, config, 0, 1), config.train.global_batch
    for step in range(steps):
        batch = text.batch(step * size, size, size)
        reference.train_step((batch.tokens_BT, batch.labels_BT, batch.loss_mask_BT), step)
    routing = reference.routing
    loads = torch.tensor(list(routing.loads.values()), dtype=torch.float64)
    choices = float(loads.sum())
    record = {
        "moe/load_balance_loss": torch.stack(routing.balance).sum().item() * config.model.experts_per_token / choices,
        "moe/router_z_loss": torch.stack(routing.z).sum().item() * config.model.experts_per_token / choices,
        "moe/max_load": float((loads.amax(dim=1) / loads.mean(dim=1)).max()),
    }
    biases = {int(name.split(".")[1]): bias.tolist() for name, bias in routing.biases.items()}
    return record, biases


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name[:8])
def test_metrics_and_biases_are_those_of_the_formulas(pool: WorkerPool, case: Case) -> None:
    record, biases = expected(3)
    dropped = set()
    for found, own in pool.run(steps_of, case, 3, layout=case.layout):
        dropped.add(found.pop("moe/dropped_share"))
        assert found == pytest.approx(record, rel=1e-12)
        for layer, bias in own.items():
            assert bias == pytest.approx(biases[layer], abs=1e-15)
    (share,) = dropped
    assert 0.05 < share < 0.5


def dense(mesh: ParallelMesh) -> dict[str, float]:
    return steps_of(mesh, Case(1, 1, 1), 1)[0]


def test_a_model_without_experts_has_no_such_metrics(pool: WorkerPool) -> None:
    assert pool.run(dense, layout=RankLayout()) == [{}]
