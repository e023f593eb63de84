"""Exact learning rates of each schedule."""

from __future__ import annotations

import pytest

from megalm.config.choices import CHOICES
from megalm.train.lr_schedules import LR_SCHEDULES, learning_rate
from tests.train.recipes import small_recipe


def test_warm_up_is_linear_and_reaches_the_peak_in_its_last_step() -> None:
    config = small_recipe(lr_schedule={"warmup_steps": 4})
    assert [learning_rate(config, step) for step in range(4)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3], rel=1e-15)


def test_cosine_has_exact_values_at_its_start_quarters_and_end() -> None:
    config = small_recipe(train={"steps": 104}, lr_schedule={"warmup_steps": 4, "min_lr_ratio": 0.2})
    expected = {
        4: 1.0,
        29: 0.2 + 0.8 * 0.8535533905932737,
        54: 0.6,
        79: 0.2 + 0.8 * 0.14644660940672624,
        104: 0.2,
    }
    for step, factor in expected.items():
        assert learning_rate(config, step) == pytest.approx(1e-3 * factor, rel=1e-14)


def test_cosine_stays_at_its_end_beyond_the_last_step() -> None:
    config = small_recipe(lr_schedule={"min_lr_ratio": 0.1})
    assert learning_rate(config, 250) == pytest.approx(1e-4, rel=1e-14)


def test_constant_keeps_the_peak_after_warm_up() -> None:
    config = small_recipe(lr_schedule={"kind": "constant", "warmup_steps": 2})
    assert [learning_rate(config, step) for step in (0, 1, 2, 99)] == [5e-4, 1e-3, 1e-3, 1e-3]


SHAPES = {
    "linear": ({"min_lr_ratio": 0.2}, {0: 1.0, 50: 0.6, 100: 0.2}),
    "exponential": ({"min_lr_ratio": 0.01}, {0: 1.0, 50: 0.1, 75: 0.01**0.75, 100: 0.01}),
    "step": ({"factor": 0.5, "milestones": [0.5, 0.75]}, {0: 1.0, 49: 1.0, 50: 0.5, 74: 0.5, 75: 0.25, 100: 0.25}),
    "inverse_sqrt": ({"warmup_steps": 4}, {4: 1.0, 12: (4 / 12) ** 0.5, 100: 0.2}),
    "cosine": ({"cycles": 2, "min_lr_ratio": 0.0}, {0: 1.0, 25: 0.5, 49: 0.0009866, 50: 1.0, 75: 0.5, 100: 0.0}),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_have_exact_values(kind: str) -> None:
    values, expected = SHAPES[kind]
    config = small_recipe(train={"steps": 100}, lr_schedule={"kind": kind, **values})
    for step, factor in expected.items():
        assert learning_rate(config, step) == pytest.approx(1e-3 * factor, rel=1e-4, abs=1e-18), step


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_a_cool_down_goes_to_zero_from_where_the_shape_is(shape: str, halfway: float) -> None:
    schedule = {
        "kind": "linear",
        "min_lr_ratio": 0.0,
        "cooldown_steps": 20,
        "cooldown_shape": shape,
        "warmup_steps": 10,
    }
    config = small_recipe(train={"steps": 110}, lr_schedule=schedule)
    assert learning_rate(config, 89) == pytest.approx(1e-3 * 0.21)
    assert learning_rate(config, 90) == pytest.approx(1e-3 * 0.2)
    assert learning_rate(config, 100) == pytest.approx(1e-3 * 0.2 * halfway)
    assert learning_rate(config, 109) > 0.0 == learning_rate(config, 110) == learning_rate(config, 500)
    stable = small_recipe(train={"steps": 110}, lr_schedule={**schedule, "kind": "constant"})
    assert {learning_rate(stable, step) for step in range(10, 91)} == {1e-3}


def test_stopping_early_does_not_change_the_schedule() -> None:
    whole, part = small_recipe(), small_recipe(train={"stop_at": 10})
    assert [learning_rate(whole, step) for step in range(10)] == [learning_rate(part, step) for step in range(10)]


def test_a_run_that_is_all_warm_up_has_no_division_by_zero() -> None:
    config = small_recipe(train={"steps": 4}, lr_schedule={"warmup_steps": 4})
    assert learning_rate(config, 3) == pytest.approx(1e-3)
    assert learning_rate(config, 4) == pytest.approx(1e-3)


def test_registry_holds_what_recipes_may_name() -> None:
    assert set(LR_SCHEDULES.names()) == set(CHOICES["lr_schedule"])
