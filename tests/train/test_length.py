"""How long a run is: in steps, tokens or epochs, or until a metric does not become better."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.train.callbacks import StopEarly
from megalm.train.trainer import Trainer, TrainState
from tests.parity.harness import build_trainer
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell


def lasting(**train: Any) -> RunConfig:
    return small_recipe(train={"steps": None, **train})


def test_tokens_and_epochs_become_whole_steps() -> None:
    """A step of the small recipe takes 4 sequences of 16 tokens."""
    assert small_recipe(train={"steps": 7}).steps == 7
    assert lasting(tokens=64).steps == 1 and lasting(tokens=65).steps == 2 and lasting(tokens=6400).steps == 100
    open_length = lasting(epochs=2.5)
    assert open_length.known_steps is None
    known = open_length.with_windows(101)  # 252.5 windows, so 253
    assert known.train.epochs is None and known.train.tokens == 253 * 16 and known.steps == 64
    assert lasting(tokens=640).with_windows(101).steps == 10
    assert lasting(epochs=8.3).with_windows(30).train.tokens == 249 * 16, "8.3 x 30 is more in binary"
    assert known.with_windows(5) == known, "a run's saved recipe is not changed again"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({}, "nothing says how long the run is; set train.steps, train.tokens or train.epochs"),
        ({"steps": 5, "epochs": 1.5}, "train.steps=5 and train.epochs=1.5 say twice how long the run is; keep one"),
        (
            {"tokens": 640, "stop_at": 11},
            "train.stop_at=11 is more than the 10 steps of train.tokens=640; use at most 10",
        ),
    ],
)
def test_a_length_that_is_none_or_two_or_too_short(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lasting(**train)


def test_epochs_too_few_for_the_warm_up_are_found_once_the_data_is_known() -> None:
    recipe = small_recipe(train={"steps": None, "epochs": 1}, lr_schedule={"warmup_steps": 30})
    assert recipe.with_windows(120).steps == 30
    with pytest.raises(
        ConfigError, match=r"warmup_steps=30 is more than the 29 steps of train.tokens=1856; use at most 29"
    ):
        recipe.with_windows(116)


class Said:
    """A tracker that remembers events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, record: dict[str, Any]) -> None:
        self.events.append(record)


class Measured:
    """An evaluation with given values at every second step."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.record: dict[str, float] = {"step": -1}

    def after_step(self, trainer: Trainer, result: Any) -> None:
        step = trainer.state.step
        if step % 2 == 0:
            self.record = {"step": step, "evaluate/loss": self.values[step // 2 - 1]}

    def at_end(self, trainer: Trainer) -> None:
        """Nothing."""


def check_stop(mesh: ParallelMesh, values: list[float], stops_at: int, **section: Any) -> None:
    overrides = {f"early_stop.{key}": value for key, value in section.items()}
    config = Cell("zero1", "fp32").config(mesh, **{"early_stop.metric": "evaluate/loss", **overrides})
    trainer, said, measured = build_trainer(mesh, config), Said(), Measured(values)
    trainer.fit([measured, StopEarly(said, measured, config.early_stop)])  # type: ignore[arg-type, list-item]
    assert trainer.state.step == trainer.last_step == stops_at
    assert [event["event"] for event in said.events] == ["early stop"] * (stops_at < config.steps)

    again = build_trainer(mesh, config)
    again.state = TrainState(**vars(trainer.state))
    again.fit([])
    assert again.state.step == stops_at, "a run that has stopped does not go on by itself"
    if stops_at < config.steps:
        patient = {**overrides, "early_stop.patience": 9, "early_stop.metric": "evaluate/loss"}
        again.config = Cell("zero1", "fp32").config(mesh, **patient)
        assert again.last_step == config.steps, "but with more patience"


def check_stops(mesh: ParallelMesh) -> None:
    falling = [3.0, 2.9, 2.8, 2.7] + [2.6] * 11
    check_stop(mesh, falling, 14, patience=2)
    check_stop(mesh, falling, 6, patience=2, min_delta=0.25)
    check_stop(mesh, [3.0, math.nan, 2.9, math.nan, math.inf, 2.8] + [2.7] * 9, 10, patience=2)
    check_stop(mesh, [math.nan, 3.0 - 1e-3] + [2.0 - k / 100 for k in range(13)], 30, patience=2)


def test_a_run_ends_when_its_metric_is_not_better_for_some_values(pool: WorkerPool) -> None:
    pool.run(check_stops, layout=RankLayout(data=2))
