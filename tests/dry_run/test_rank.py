"""A dry run of a rank against what the same rank of a world that runs holds, sends and needs at most."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megalm.config.run import RunConfig
from megalm.dry_run.rank import DryRun, run_rank
from tests.dry_run.real import Seen, by_axis, expected_calls, expected_messages, observe
from tests.parity.harness import LLAMA, VOCAB, Case
from tests.worker_pool import WorkerPool

SHAPE: dict[str, Any] = {"model.hidden": 64, "model.layers": 4, "model.sequence": 32, "train.global_batch": 16}
SEQUENCE = {"parallel.sequence": True}
DIVIDED = {"zero.stage": 2, "precision": "bf16"}
CASES = [
    Case(2, 1, 2, {**SHAPE, "precision": "fp32"}),
    Case(2, 1, 2, {**SHAPE, **LLAMA, **SEQUENCE, "precision": "bf16", "train.recompute": "full"}),
    Case(2, 2, 1, {**SHAPE, "zero.stage": 1, "precision": "bf16", "parallel.schedule": "interleaved", "parallel.virtual_stages": 2}),
    Case(1, 2, 2, {**SHAPE, "zero.stage": 1, "precision": "fp32", "optim.kind": "lion"}),
    Case(1, 2, 2, {**SHAPE, **LLAMA, **SEQUENCE, **DIVIDED, "optim.kind": "muon"}),
    Case(2, 2, 1, {**SHAPE, **DIVIDED, "parallel.schedule": "zb-h1", "model.dropout": 0.1}),
    Case(1, 4, 1, {**SHAPE, "precision": "bf16", "optim.kind": "adafactor", "optim.ema_decay": 0.9}),
    Case(2, 2, 1, {**SHAPE, "zero.stage": 1, "precision": "fp64", "parallel.schedule": "zb-v", "optim.centralize": True}),
]  # fmt: skip


def dry(case: Case, rank: int, config: RunConfig | None = None) -> DryRun:
    return run_rank(config or case.config(), case.layout, rank, VOCAB)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def both(request: pytest.FixtureRequest, pool: WorkerPool) -> list[tuple[DryRun, Seen]]:
    """Give the dry run of each rank of a small world, and the real one."""
    case: Case = request.param
    seen = pool.run(observe, case.config(), layout=case.layout)
    return [(dry(case, rank), seen[rank]) for rank in range(case.layout.world_size)]


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
