"""The loss scale of fp16: its exact sequence when gradients overflow, in every layout, and after a resume."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from megalm.config.run import LossScaleSection
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import MegalmError
from megalm.train.loss_scale import follow
from megalm.train.trainer import Trainer, TrainState
from tests.parity.harness import Case, build_trainer, run_case
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell, assert_equal, check_cells, check_resume, held_weights, saved

INITIAL, WINDOW = 1024.0, 3
FP16: dict[str, Any] = {"loss_scale.initial": INITIAL, "loss_scale.window": WINDOW}
OVERFLOWS = {2, 3, 7, 13}
STEPS = 14
SCALES = [1024, 1024, 512, 256, 256, 256, 512, 256, 256, 256, 512, 512, 512, 256]
"""Of steps 1 to 14, by hand: halved after steps 2, 3, 7 and 13, doubled after steps 6 and 10."""
LAYOUTS = (RankLayout(data=2), RankLayout(data=2, tensor=2), RankLayout(pipeline=2, data=2))


def test_the_sequence_written_by_hand_is_the_rules() -> None:
    state, settings = TrainState(loss_scale=INITIAL), LossScaleSection(initial=INITIAL, window=WINDOW)
    found = []
    for step in range(1, STEPS + 1):
        found.append(state.loss_scale)
        assert follow(state, settings, step in OVERFLOWS) == (step in OVERFLOWS)
    assert found == SCALES


def test_at_its_minimum_the_scale_stays_and_an_overflow_is_not_excused() -> None:
    state, settings = TrainState(loss_scale=6.0), LossScaleSection(initial=6.0, window=2, minimum=4.0)
    assert follow(state, settings, overflowed=True) and state.loss_scale == 4.0
    assert not follow(state, settings, overflowed=True) and state.loss_scale == 4.0
    for _ in range(2):
        assert not follow(state, settings, overflowed=False)
    assert state.loss_scale == 8.0 and state.clean_steps == 0


def overflow_at(trainer: Trainer, steps: set[int]) -> None:
    """Let the gradients of one rank overflow in some steps."""
    run, mesh = trainer.executor.run, trainer.mesh
    here = mesh.coordinates.data == mesh.size("data") - 1

    def planted(microbatches: Any, scale: torch.Tensor, after_backward: Any) -> torch.Tensor:
        return run(microbatches, scale * 1e9 if here and trainer.state.step + 1 in steps else scale, after_backward)

    trainer.executor.run = planted  # type: ignore[method-assign]


def check_sequence(mesh: ParallelMesh, cell: Cell) -> None:
    config = cell.config(mesh, **FP16)
    trainer = build_trainer(mesh, config)
    overflow_at(trainer, OVERFLOWS)
    scales = []
    for step in range(1, STEPS + 1):
        weights = held_weights(trainer)
        result = trainer.train_step()
        scales.append(result.loss_scale)
        assert result.wrong is None and math.isfinite(result.loss)
        assert math.isfinite(result.grad_norm) == (step not in OVERFLOWS), f"step {step}: {result}"
        if step in OVERFLOWS:
            assert_equal(weights, held_weights(trainer))
    assert scales == SCALES
    assert (trainer.state.step, trainer.state.updates) == (STEPS, STEPS - len(OVERFLOWS))

    store = saved(trainer)
    resumed = build_trainer(mesh, config)
    resumed.engine.load(store.read, sorted(store.kinds() - {"weight"}), trainer.state.updates)
    resumed.state = TrainState(**vars(trainer.state))
    for each in (trainer, resumed):
        overflow_at(each, {STEPS + 2})
    expected, found = ([each.train_step() for _ in range(4)] for each in (trainer, resumed))
    assert [(r.loss, r.loss_scale) for r in found] == [(r.loss, r.loss_scale) for r in expected]
    saved(trainer).assert_same(saved(resumed))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_sequence_of_scales_under_forced_overflow_is_exact_in_every_layout(
    pool: WorkerPool, layout: RankLayout
) -> None:
    engines = ["zero0", "zero1", "zero2", *(["zero3", "zero2-offload"] if layout.pipeline == 1 else [])]
    pool.run(check_cells, check_sequence, [Cell(zero, "fp16") for zero in engines], layout=layout)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero3-offload"])
def test_fp16_resumes_bit_for_bit(pool: WorkerPool, zero: str) -> None:
    pool.run(check_resume, Cell(zero, "fp16"), layout=RankLayout(data=2))


def check_real_overflow(mesh: ParallelMesh) -> list[float | None]:
    config = Case(tensor=mesh.size("tensor"), overrides={"precision": "fp16", "loss_scale.initial": 2.0**30}).config()
    trainer = build_trainer(mesh, config)
    results = [trainer.train_step() for _ in range(25)]
    assert not math.isfinite(results[0].grad_norm) and math.isfinite(results[-1].grad_norm)
    for before, after in pairwise(results):
        assert after.loss_scale == (before.loss_scale or 0.0) / (1.0 if math.isfinite(before.grad_norm) else 2.0)
    return [result.loss_scale for result in results]


def test_a_scale_that_is_too_large_comes_down_by_itself(pool: WorkerPool) -> None:
    assert len({tuple(scales) for scales in pool.run(check_real_overflow, layout=RankLayout(tensor=2))}) == 1


def check_minimum(mesh: ParallelMesh) -> None:
    config = Cell("zero1", "fp16").config(mesh, **{"loss_scale.initial": 2.0, "loss_scale.minimum": 2.0})
    trainer = build_trainer(mesh, config)
    overflow_at(trainer, {2})
    with pytest.raises(MegalmError, match=r"step 2: the gradient norm is (inf|nan), no update was made"):
        trainer.fit([])


def test_an_overflow_at_the_minimum_is_a_step_that_went_wrong(pool: WorkerPool) -> None:
    pool.run(check_minimum, layout=RankLayout(data=2))


@pytest.mark.parametrize(("layout", "stage"), [((2, 2, 2), 0), ((2, 2, 2), 1), ((1, 2, 2), 3)])
def test_fp16_follows_the_reference(pool: WorkerPool, layout: tuple[int, int, int], stage: int) -> None:
    """fp16 rounds by 2^-12, an eighth of bf16's, and its gradients are as good where the scale lifts them."""
    case = Case(*layout, {"zero.stage": stage, "precision": "fp16", "train.micro_batch": 1})
    difference, _ = run_case(pool, case, 10)
    assert difference.gradient < 0.01
    assert difference.loss < 5e-4
    assert difference.norm < 5e-3
