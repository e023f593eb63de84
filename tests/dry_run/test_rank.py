"""A dry run of a rank against what the same rank of a world that runs holds, sends and needs at most."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megalm.dry_run.rank import DryRun, run_rank
from megalm.models import offload
from megalm.pipeline_parallel.schedules import SCHEDULES
from tests.dry_run.real import Seen, by_axis, expected_calls, expected_messages, observe
from tests.parity.harness import LLAMA, VOCAB, Case
from tests.worker_pool import WorkerPool

SHAPE: dict[str, Any] = {"model.hidden": 64, "model.layers": 4, "model.sequence": 32, "train.global_batch": 16}
SEQUENCE = {**SHAPE, **LLAMA, "parallel.sequence": True, "precision": "bf16"}
CHUNKS = {**SHAPE, "parallel.schedule": "interleaved", "parallel.virtual_stages": 2}
FROZEN = {"optim.rules": [{"match": "blocks.0.attention.*", "freeze": True}, {"match": "*.mlp.*", "lr": 0.5}]}
OFFLOAD = {"train.offload_activations": True}
OVERLAP = {"overlap.gradients": True, "overlap.tensor_chunks": 3}
DIVIDED = {"zero.stage": 2, "precision": "bf16"}
EXPERTS = {**SHAPE, "model.experts": 4, "model.experts_per_token": 2}
BALANCED = {"model.shared_experts": 1, "model.router_bias_rate": 0.01, "model.router_score": "sigmoid"}
CASES = [
    Case(2, 1, 2, {**SHAPE, "precision": "fp32"}),
    Case(2, 1, 2, {**SEQUENCE, "train.recompute": "full"}),
    Case(2, 1, 2, {**SEQUENCE, "train.recompute": "selective"}),
    Case(1, 1, 2, {**SEQUENCE, "train.fp8": "rowwise", "train.global_batch": 4}),
    Case(2, 2, 1, {**CHUNKS, "zero.stage": 1, "precision": "bf16", "optim.centralize": True}),
    Case(1, 2, 2, {**SHAPE, **FROZEN, "zero.stage": 1, "precision": "fp32", "optim.kind": "lion"}),
    Case(1, 2, 2, {**SEQUENCE, **DIVIDED, "optim.kind": "muon"}),
    Case(2, 2, 1, {**SHAPE, **DIVIDED, "parallel.schedule": "zb-h1", "model.dropout": 0.1}),
    Case(1, 2, 2, {**SHAPE, **OVERLAP, "precision": "bf16", "train.recompute": "full"}),
    Case(1, 2, 1, {**SHAPE, "overlap.gradients": True, "precision": "bf16", "train.reduce_dtype": "bf16"}),
    Case(2, 1, 2, {**SEQUENCE, "overlap.tensor_chunks": 2, "overlap.messages": False, "parallel.schedule": "zb-h1"}),
    Case(1, 4, 1, {**SHAPE, "precision": "bf16", "optim.kind": "adafactor", "optim.ema_decay": 0.9}),
    Case(
        2, 2, 1, {**SHAPE, "zero.stage": 1, "precision": "fp64", "parallel.schedule": "zb-v", "optim.centralize": True}
    ),
    Case(2, 1, 2, {**SEQUENCE, "model.layers": 8, **OFFLOAD}),
    Case(2, 1, 1, {**SHAPE, **OFFLOAD, "model.layers": 8, "train.recompute": "full", "parallel.schedule": "zb-h1"}),
    Case(1, 1, 2, {**SHAPE, **OFFLOAD, "train.recompute": "selective", "model.dropout": 0.1, "model.mtp_depth": 1}),
    Case(2, 2, 1, {**EXPERTS, "parallel.expert": 2, "precision": "fp32"}),
    Case(1, 2, 2, {**EXPERTS, "precision": "bf16", "model.capacity_factor": 1.5, "train.recompute": "full"}),
    Case(2, 2, 1, {**EXPERTS, **BALANCED, "parallel.expert": 2, "zero.stage": 1, "precision": "bf16"}),
    Case(1, 4, 1, {**EXPERTS, **DIVIDED, "parallel.expert": 2, "model.capacity_factor": 0.5, **FROZEN}),
    Case(1, 4, 1, {**EXPERTS, "parallel.expert": 2, "precision": "bf16", "optim.centralize": True}),
    Case(1, 2, 2, {**EXPERTS, **BALANCED, "parallel.expert": 2, "zero.stage": 1, "precision": "fp64"}),
    Case(1, 2, 2, {**SEQUENCE, **EXPERTS, **LLAMA, "parallel.expert": 2, "zero.stage": 1, "optim.centralize": True}),
    Case(1, 2, 1, {**EXPERTS, **DIVIDED, "parallel.context": 2, "parallel.expert": 2, "model.capacity_factor": 1.0}),
]
SMALL_BUCKETS = {"zero_optimization": {"stage": 2, "reduce_scatter": True, "reduce_bucket_size": 5000}}


def dry(case: Case, rank: int, every: bool = False) -> DryRun:
    with mock.patch.object(offload, "SMALL", 0):  # as in the runs that it is held to
        return run_rank(case.config(), case.layout, rank, VOCAB, every)


def ends(pool: WorkerPool, case: Case) -> list[tuple[DryRun, Seen]]:
    seen = pool.run(observe, case.config(), layout=case.layout)
    return [(dry(case, rank), seen[rank]) for rank in (0, case.layout.world_size - 1)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def both(request: pytest.FixtureRequest, pool: WorkerPool) -> list[tuple[DryRun, Seen]]:
    """Give the dry run and the real one of a small world's first and last rank, which differ on every axis."""
    return ends(pool, request.param)


def test_a_rank_holds_what_is_said(both: list[tuple[DryRun, Seen]]) -> None:
    for run, seen in both:
        assert run.held == seen.held


def test_a_rank_sends_what_is_said_in_that_order(both: list[tuple[DryRun, Seen]]) -> None:
    for run, seen in both:
        found, said = by_axis(seen.calls), by_axis(expected_calls(run))
        if run.config.optim.kind in (
            "muon",
            "adafactor",
        ):  # which send in their update, as the dry run says it leaves out
            assert run.unstated
            continue
        messages = [call for axis, is_message in found if is_message for call in found[axis, is_message]]
        assert Counter(call.operation for call in messages) == Counter(expected_messages(run))
        assert {call._replace(operation="") for call in messages} <= {
            run.message and run.message._replace(operation="")
        }
        assert {key: calls for key, calls in found.items() if not key[1]} == said


def test_the_peak_of_activations_is_that_of_a_real_step(both: list[tuple[DryRun, Seen]]) -> None:
    for run, seen in both:
        beside = run.buffers + (run.held["gradients"] if run.config.zero.stage == 2 else 0)
        assert seen.activations == pytest.approx(run.activations + beside, rel=0.05), run.peak_at


def test_as_much_waits_in_the_host_as_in_a_real_step(both: list[tuple[DryRun, Seen]]) -> None:
    for run, seen in both:
        assert run.offloaded == seen.offloaded
        assert (run.offloaded > 0) == run.config.train.offload_activations


@pytest.mark.parametrize("shape", [SHAPE, {**EXPERTS, "parallel.expert": 2}], ids=["dense", "experts"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_larger_than_a_bucket_are_reduced_as_is_said(
    pool: WorkerPool, tmp_path: Path, stage: int, shape: dict[str, Any]
) -> None:
    file = tmp_path / "small-buckets.json"
    file.write_text(json.dumps(SMALL_BUCKETS).replace('"stage": 2', f'"stage": {stage}'))
    case = Case(1, 4, 1, {**shape, "precision": "bf16", "zero.stage": stage, "zero.config": str(file)})
    for run, seen in ends(pool, case):
        assert by_axis(seen.calls) == by_axis(expected_calls(run))


LITTLE_AT_ONCE = {
    "stage3_prefetch_bucket_size": 10000,
    "stage3_max_live_parameters": 30000,
    "stage3_max_reuse_distance": 20000,
    "stage3_param_persistence_threshold": 100,
    "reduce_bucket_size": 20000,
}
ZERO_3 = [
    (Case(1, 2, 2, {**SHAPE, "precision": "bf16"}), {"stage3_param_persistence_threshold": 1}),
    (Case(1, 4, 1, {**SHAPE, "precision": "fp32"}), LITTLE_AT_ONCE),
    (Case(1, 2, 2, {**SEQUENCE, "train.recompute": "full"}), LITTLE_AT_ONCE),
    (Case(1, 4, 1, {**EXPERTS, **BALANCED, **FROZEN, "precision": "bf16"}), LITTLE_AT_ONCE),
    (Case(1, 2, 2, {**SHAPE, "precision": "fp64", "optim.centralize": True}), LITTLE_AT_ONCE),
    (Case(1, 4, 1, {**SHAPE, "precision": "fp16"}), {**LITTLE_AT_ONCE, "zero_hpz_partition_size": 2}),
]


@pytest.mark.parametrize(("case", "json_keys"), ZERO_3, ids=[case.name for case, _ in ZERO_3])
def test_what_zero_3_holds_and_sends_is_said(
    pool: WorkerPool, tmp_path: Path, case: Case, json_keys: dict[str, Any]
) -> None:
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": False, **json_keys}}))
    case.overrides.update({"zero.stage": 3, "zero.config": str(file)})
    for run, seen in ends(pool, case):
        assert run.held == pytest.approx(seen.held, rel=0.01)
        assert by_axis(seen.calls) == by_axis(expected_calls(run))
        assert run.unstated == []
        # Gloo waits for a reduction with a copy of it.
        copied = max(c.nbytes for c in seen.calls if c.elements > 1 and c.operation in ("reduce-scatter", "all-reduce"))
        assert 0.95 * run.activations < seen.activations < 1.05 * (run.activations + copied), run.peak_at


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_some_microbatches_hold_as_much_as_all(schedule: str) -> None:
    chunks = {"parallel.virtual_stages": 2} if SCHEDULES.get(schedule).fixed_chunks is None else {}
    shape = {**SHAPE, "model.layers": 8, "train.global_batch": 32, "precision": "fp32"}
    case = Case(4, 1, 1, {**shape, **chunks, "parallel.schedule": schedule})
    for rank in (0, 3):
        some = dry(case, rank)
        if schedule in ("gpipe", "breadth-first"):  # which hold all microbatches
            assert some.executed == 16
            continue
        everything = dry(case, rank, every=True)
        assert some.executed < everything.executed == 16
        assert (some.activations, some.work) == (everything.activations, everything.work)
