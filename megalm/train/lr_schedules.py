"""The learning rate of each step: warm-up, then a shape chosen by `lr_schedule.kind`.

Owns the shapes and their registry. The optimizer is told the rate by the trainer; nothing here has state, so
a resumed run needs nothing but its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megalm.config.optim import LrScheduleSection
from megalm.config.run import RunConfig
from megalm.registry import Registry

Shape = Callable[[int, int, LrScheduleSection], float]
"""Steps since the warm-up, steps from its end to the run's, the section -> the factor of the peak rate, in [0, 1]."""

LR_SCHEDULES: Registry[Shape] = Registry("lr_schedule")


@LR_SCHEDULES.register("constant")
def constant(step: int, steps: int, schedule: LrScheduleSection) -> float:
    """Return 1: the peak rate until the end."""
    return 1.0


@LR_SCHEDULES.register("linear")
def linear(step: int, steps: int, schedule: LrScheduleSection) -> float:
    """Return a straight line from 1 down to `min_lr_ratio`."""
    return 1.0 - (1.0 - schedule.min_lr_ratio) * step / steps


@LR_SCHEDULES.register("cosine")
def cosine(step: int, steps: int, schedule: LrScheduleSection) -> float:
    """Return half a cosine from 1 down to `min_lr_ratio` in each of `cycles` equal parts.

    Source: Loshchilov and Hutter 2017, equation 5.
    """
    turns = schedule.cycles * step / steps
    progress = turns - min(math.floor(turns), schedule.cycles - 1)
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


@LR_SCHEDULES.register("exponential")
def exponential(step: int, steps: int, schedule: LrScheduleSection) -> float:
    """Return a curve from 1 down to `min_lr_ratio` that falls by the same share in every step."""
    return float(schedule.min_lr_ratio ** (step / steps))


@LR_SCHEDULES.register("step")
def step_(step: int, steps: int, schedule: LrScheduleSection) -> float:
    """Return `factor` to the power of the milestones that are passed (DeepSeek 2024: 0.316 at 80% and 90%)."""
    passed = sum(step >= share * steps for share in schedule.milestones)
    return float(schedule.factor**passed)


@LR_SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(step: int, steps: int, schedule: LrScheduleSection) -> float:
    """Return 1 over the root of the steps so far over those of the warm-up (Vaswani et al. 2017, equation 3)."""
    warmup = max(1, schedule.warmup_steps)
    return math.sqrt(warmup / (warmup + step))


COOLDOWNS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1.0 - math.cos(math.pi * left)),
    "sqrt": lambda left: 1.0 - math.sqrt(1.0 - left),  # Haegele et al. 2024: better than linear
}
"""The share of the cool-down that is left -> the factor."""


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Warm-up: `optim.lr * (step + 1) / warmup_steps`, which reaches `optim.lr` in its last step. After it the shape runs
    over the steps that remain of the whole run (never of `train.stop_at`: a run that stops early keeps its schedule)
    and stays at its end beyond them. The cool-down starts from where the shape is before its first step.
    """
    schedule, peak, steps = config.lr_schedule, config.optim.lr, config.steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    remaining = max(1, steps - schedule.warmup_steps)
    first_cool = steps - schedule.cooldown_steps
    place = min(step, first_cool) - schedule.warmup_steps
    rate = peak * LR_SCHEDULES.get(schedule.kind)(place, remaining, schedule)
    if step < first_cool or not schedule.cooldown_steps:
        return rate
    left = max(0, steps - step) / schedule.cooldown_steps
    return rate * COOLDOWNS[schedule.cooldown_shape](left)
