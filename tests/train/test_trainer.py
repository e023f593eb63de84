"""A step's gradient does not depend on how the batch is cut, and the loop counts what it does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import MegalmError
from megalm.train.lr_schedules import learning_rate
from megalm.train.trainer import StepResult, Trainer, TrainState
from tests.parity.harness import VOCAB, Case, RandomText, RankReport, build_trainer, compare, reference_run
from tests.worker_pool import WorkerPool

SMALL: dict[str, Any] = {
    "model.layers": 2, "model.hidden": 8, "model.heads": 2, "model.sequence": 8, "model.dropout": 0.2,
}  # fmt: skip


def recipe(mesh: ParallelMesh, **overrides: Any) -> Any:
    layout = mesh.layout
    return Case(layout.pipeline, layout.data, layout.tensor, {**SMALL, **overrides}).config()


def step_reports(mesh: ParallelMesh) -> list[RankReport]:
    """Return what one step gives for each size of microbatch that fits."""
    reports = []
    for micro_batch in (1, 2, 4, 8):
        if micro_batch * mesh.size("data") > 8:
            continue
        trainer = build_trainer(mesh, recipe(mesh, **{"train.micro_batch": micro_batch}))
        reduce, report = trainer.engine.reduce, RankReport([], [], [], {})

        def look(trainer: Trainer = trainer, reduce: Any = reduce, report: RankReport = report) -> None:
            reduce()
            report.gradients = [(f.shard, f.start, f.values.clone()) for f in trainer.engine.gradients()]

        trainer.engine.reduce = look  # type: ignore[method-assign]
        result = trainer.train_step()
        report.losses.append(result.loss)
        report.norms.append(result.grad_norm)
        reports.append(report)
    return reports


@pytest.mark.parametrize("layout", [RankLayout(), RankLayout(data=2), RankLayout(pipeline=2)], ids=str)
def test_microbatches_weigh_by_their_valid_tokens(pool: WorkerPool, layout: RankLayout) -> None:
    """Samples have between a third and nine tenths of their tokens valid; one batch in one piece is the reference."""
    text = RandomText(VOCAB, Case(overrides=SMALL).config(), 0, 1).batch(0, 8, 8)
    assert len(set(text.loss_mask_BT.sum(1).tolist())) > 2, "the masks are not uneven"
    expected = reference_run(Case(overrides=SMALL).config(), 1)
    for reports in zip(*pool.run(step_reports, layout=layout), strict=True):
        difference = compare(reports, expected)
        assert difference.gradient < 1e-12 and difference.loss < 1e-13 and difference.norm < 1e-13


class Diary:
    """A callback that notes what it is told."""

    def __init__(self, name: str, notes: list[Any]) -> None:
        self.name, self.notes = name, notes

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.notes.append((self.name, trainer.state.step))

    def at_end(self, trainer: Trainer) -> None:
        self.notes.append((self.name, "end"))


def check_loop(mesh: ParallelMesh) -> None:
    trainer = build_trainer(mesh, recipe(mesh, **{"train.steps": 5, "train.stop_at": 2}))
    notes: list[Any] = []
    trainer.fit([Diary("a", notes), Diary("b", notes)])
    assert notes == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", "end"), ("b", "end")]
    state = vars(trainer.state) | {"losses": []}
    assert state == vars(TrainState(step=2, samples=16, planned=16, tokens=16 * 8)) and len(trainer.state.losses) == 2
    notes.clear()
    trainer.fit([Diary("a", notes)])
    assert notes == [("a", "end")] and trainer.state.step == 2
    assert [build_trainer(mesh, recipe(mesh, **{"train.steps": 5, "train.stop_at": stop})).last_step
            for stop in (None, 2, 5)] == [5, 2, 5]  # fmt: skip


def check_each_step_has_its_own_samples_rate_and_masks(mesh: ParallelMesh) -> None:
    trainer = build_trainer(mesh, recipe(mesh, **{"lr_schedule.warmup_steps": 3}))
    asked: list[tuple[int, int, int]] = []
    rows, split = trainer.loader.batch, trainer._split
    keys: list[Any] = []

    def batch(first: int, count: int, share: int) -> Any:
        asked.append((first, count, share))
        return rows(first, count, share)

    def noted(batch: Any, size: int) -> Any:
        microbatches = split(batch, size)
        keys.append([(part.dropout.seed, part.dropout.step, part.dropout.first_sample) for part in microbatches])
        return microbatches

    trainer.loader.batch = batch  # type: ignore[method-assign]
    trainer._split = noted  # type: ignore[method-assign]
    rates = [trainer.train_step().lr for _ in range(3)]
    assert asked == [(first, 8, 8 // mesh.size("data")) for first in (0, 8, 16)]
    assert rates == [learning_rate(trainer.config, step) for step in range(3)] and len(set(rates)) == 3
    first = 4 * mesh.index("data")
    assert keys == [[(7, step, first + at) for at in (0, 2)] for step in range(3)]
    without = build_trainer(mesh, recipe(mesh, **{"model.dropout": 0.0}))
    assert all(part.dropout is None for part in without._split(rows(0, 8, 4), 2))


def check_mean_loss(mesh: ParallelMesh) -> list[float]:
    check_each_step_has_its_own_samples_rate_and_masks(mesh)
    trainer = build_trainer(mesh, recipe(mesh))
    return [trainer.train_step().loss for _ in range(2)]


def check_bad_gradient(mesh: ParallelMesh) -> None:
    trainer = build_trainer(mesh, recipe(mesh))
    first = trainer.train_step()
    trainer.engine.loss_factor = math.nan
    weights = [p.detach().clone() for p in trainer.engine.module.parameters()]
    result = trainer.train_step()
    assert result.wrong == "the gradient norm is nan" and math.isfinite(result.loss)
    state = trainer.state
    assert (state.step, state.samples, state.updates, state.losses) == (2, 16, 1, [first.loss])
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.engine.module.parameters(), strict=True))
    with pytest.raises(MegalmError, match="step 3: the gradient norm is nan, no update was made"):
        trainer.fit([])


class BackToTheStart:
    """A recovery that takes the first step back, whatever its weights."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str | None]] = []

    def after_wrong_step(self, trainer: Trainer, result: StepResult) -> bool:
        self.told.append((trainer.state.step, result.wrong))
        trainer.engine.loss_factor = 1.0
        trainer.state.step -= 1
        return len(self.told) == 1


def check_recovery(mesh: ParallelMesh) -> None:
    """A step that is taken back reaches no callback; one that is only skipped does."""
    trainer = build_trainer(mesh, recipe(mesh, **{"train.steps": 5, "train.stop_at": 3}))
    trainer.engine.loss_factor = math.nan
    recovery, notes = BackToTheStart(), []
    trainer.fit([Diary("a", notes)], recovery=recovery)
    assert recovery.told == [(1, "the gradient norm is nan")]
    assert notes == [("a", 1), ("a", 2), ("a", 3), ("a", "end")]


def check_one_rank(mesh: ParallelMesh) -> None:
    check_loop(mesh)
    check_bad_gradient(mesh)
    check_recovery(mesh)


def test_the_loop_stops_counts_and_calls_back_in_order_and_refuses_bad_gradients(pool: WorkerPool) -> None:
    pool.run(check_one_rank, layout=RankLayout())


def test_steps_take_their_own_samples_rates_and_masks_and_all_ranks_know_the_loss(pool: WorkerPool) -> None:
    losses = pool.run(check_mean_loss, layout=RankLayout(pipeline=1, data=2))
    assert losses[0] == losses[1]
    expected = reference_run(Case(overrides=SMALL).config(), 2)[1]
    assert losses[0] == pytest.approx(expected, rel=1e-12)
