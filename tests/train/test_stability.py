"""A spike is told from the noise of a healthy loss."""

from __future__ import annotations

import math
import random

import pytest

from megalm.config.run import StabilitySection
from megalm.train.stability import why_wrong

SETTINGS = StabilitySection()


def noisy(count: int, seed: int, fall: float = 0.0) -> list[float]:
    """Return losses around 3 with a deviation of 0.05, falling by `fall` in all."""
    draw = random.Random(seed)
    return [3.0 - fall * step / count + draw.gauss(0.0, 0.05) for step in range(count)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_wrong_from_the_first_step_on(loss: float) -> None:
    assert why_wrong(loss, [], SETTINGS) == f"the loss is {loss}"
    assert why_wrong(loss, [3.0] * 128, StabilitySection(spike_sigma=0.0)) == f"the loss is {loss}"


def test_a_spike_is_more_than_six_deviations_above_the_mean() -> None:
    losses = [2.9, 3.1] * 64  # mean 3, deviation 0.1
    assert why_wrong(3.59, losses, SETTINGS) is None
    text = why_wrong(3.7, losses, SETTINGS)
    assert text == "the loss is 3.7000, 7.0 standard deviations above the mean 3.0000 of the last 128 steps"
    assert why_wrong(3.7, losses, StabilitySection(spike_sigma=8.0)) is None
    assert why_wrong(1e9, losses, StabilitySection(spike_sigma=0.0)) is None
    assert why_wrong(0.0, losses, SETTINGS) is None, "a loss that falls is no spike"


def test_half_a_window_is_needed() -> None:
    assert why_wrong(1e3, [3.0] * 63, SETTINGS) is None
    assert why_wrong(1e3, [3.0] * 64, SETTINGS) is not None
    assert why_wrong(1e3, [3.0] * 8, StabilitySection(spike_window=16)) is not None


def test_losses_that_hardly_move_make_no_spike_of_a_small_step() -> None:
    assert why_wrong(3.017, [3.0] * 128, SETTINGS) is None
    assert why_wrong(3.019, [3.0] * 128, SETTINGS) is not None


@pytest.mark.parametrize("fall", [0.0, 0.5])
def test_ten_thousand_healthy_steps_hold_no_spike(fall: float) -> None:
    losses = noisy(10_000, seed=5, fall=fall * 100)
    wrong = [n for n, loss in enumerate(losses) if why_wrong(loss, losses[max(0, n - 128) : n], SETTINGS)]
    assert not wrong
