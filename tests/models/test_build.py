"""A recipe's stages together are the model: every logical tensor once, in the recipe's precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.models.build import DTYPES, build_executor, build_stage, stage_plan
from megalm.models.transformer import StagePlan
from megalm.tensor_parallel.linear import Linear
from tests.parity.harness import VOCAB, Case, build_trainer
from tests.parity.reference import Reference, parameter_shapes
from tests.shards import assert_close, part_of, spec_of
from tests.worker_pool import WorkerPool


def test_stage_plans_follow_the_partition() -> None:
    even = Case(pipeline=2).config()
    assert [stage_plan(even, stage) for stage in range(2)] == [
        StagePlan((range(0, 2),), True, False), StagePlan((range(2, 4),), False, True)
    ]  # fmt: skip
    uneven = Case(pipeline=3, overrides={"parallel.partition": [2, 1, 1]}).config()
    assert [stage_plan(uneven, stage).layers for stage in range(3)] == [(0, 1), (2,), (3,)]
    assert not stage_plan(uneven, 1).first and not stage_plan(uneven, 1).last
    assert stage_plan(Case().config(), 0) == StagePlan((range(0, 4),), True, True)


def test_chunks_of_a_stage_are_not_neighbours_and_a_fold_brings_both_ends_to_the_first_stage() -> None:
    looped = Case(pipeline=2, overrides={"parallel.schedule": "interleaved", "parallel.virtual_stages": 2}).config()
    assert [stage_plan(looped, stage) for stage in range(2)] == [
        StagePlan((range(0, 1), range(2, 3)), True, False), StagePlan((range(1, 2), range(3, 4)), False, True)
    ]  # fmt: skip
    folded = Case(pipeline=2, overrides={"parallel.schedule": "zb-v"}).config()
    assert [stage_plan(folded, stage) for stage in range(2)] == [
        StagePlan((range(0, 1), range(3, 4)), True, True), StagePlan((range(1, 2), range(2, 3)), False, False)
    ]  # fmt: skip
    plan = stage_plan(folded, 0)
    assert plan.layers == (0, 3)
    assert [plan.embeds(chunk) for chunk in range(2)] == [True, False]
    assert [plan.predicts(chunk) for chunk in range(2)] == [False, True]


def names_and_values(mesh: ParallelMesh, overrides: dict[str, Any]) -> list[str]:
    case = Case(mesh.layout.pipeline, mesh.layout.data, mesh.layout.tensor, overrides)
    config = case.config()
    model = build_stage(config, VOCAB, mesh)
    wholes = Reference(config, VOCAB, DTYPES[config.precision]).parameters
    for parameter in model.parameters():
        spec = spec_of(parameter)
        assert parameter.dtype is DTYPES[config.precision] and parameter.shape == spec.local_shape
        whole = part_of(wholes[spec.name].double(), spec)
        assert_close(parameter.detach().double(), whole, spec.name, torch.finfo(parameter.dtype).eps)
    return [spec_of(p).name for p in model.parameters() if spec_of(p).dim is not None or mesh.index("tensor") == 0]


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        (RankLayout(), {"precision": "bf16"}),
        (RankLayout(pipeline=2, tensor=2), {"model.tie_embeddings": False}),
        (RankLayout(pipeline=2), {"precision": "fp32", "parallel.partition": [1, 3]}),
        (RankLayout(pipeline=2), {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2}),
        (RankLayout(pipeline=2, tensor=2), {"parallel.schedule": "zb-v"}),
        (RankLayout(pipeline=2, tensor=2), {"model.tie_embeddings": False, "model.mtp_depth": 2, "model.kv_rank": 12}),
    ],
)
def test_stages_hold_every_logical_tensor_with_the_first_values_of_one_process(
    pool: WorkerPool, layout: RankLayout, overrides: dict[str, Any]
) -> None:
    names = [name for rank in pool.run(names_and_values, overrides, layout=layout) for name in rank]
    config = Case(layout.pipeline, 1, layout.tensor, overrides).config()
    expected = parameter_shapes(config, VOCAB).keys()
    assert set(names) == expected
    both_ends = config.model.tie_embeddings or config.model.mtp_depth > 0
    for _ in range(layout.tensor if both_ends and layout.pipeline > 1 and config.parallel.schedule != "zb-v" else 0):
        names.remove("embedding.weight")
    assert all(names.count(name) in (1, layout.tensor) for name in expected)


def check_passed_on(mesh: ParallelMesh) -> None:
    overrides = {"parallel.sequence": True, "loss.label_smoothing": 0.3, "train.recompute": "full"}
    config = Case(tensor=2, overrides=overrides).config()
    model = build_stage(config, VOCAB, mesh)
    assert model.sequence and model.recompute == "full" and model.label_smoothing == 0.3 and model.vocab == VOCAB
    plain = build_stage(Case(tensor=2).config(), VOCAB, mesh)
    assert not plain.sequence and plain.recompute == "none" and plain.label_smoothing == 0.0
    executor = build_executor(config, model, mesh)
    assert executor._hidden_shape is not None
    assert executor._activation_shape(3, 16) == (3, 8, 32)
    assert build_executor(Case(tensor=2).config(), plain, mesh)._activation_shape(3, 16) == (3, 16, 32)
    build_trainer(mesh, config).train_step()


def check_put_off(mesh: ParallelMesh, schedule: str) -> tuple[int, int]:
    config = Case(pipeline=2, overrides={"parallel.schedule": schedule, "model.kv_heads": 1}).config()
    model = build_stage(config, VOCAB, mesh)
    executor = build_executor(config, model, mesh)
    put_off = executor._weight_gradients.linear
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    return len(layers), sum(layer.linear == put_off for layer in layers)


def test_linear_layers_of_blocks_put_their_weights_off_where_the_schedule_splits_backwards(pool: WorkerPool) -> None:
    layout = RankLayout(pipeline=2)
    assert pool.run(check_put_off, "1f1b", layout=layout) == [(8, 0)] * 2  # of two blocks: q and kv, out, up, down
    assert pool.run(check_put_off, "zb-v", layout=layout) == [(8, 8)] * 2


def test_sequence_smoothing_and_recompute_reach_the_model_and_its_messages(pool: WorkerPool) -> None:
    pool.run(check_passed_on, layout=RankLayout(tensor=2))
