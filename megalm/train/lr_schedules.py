"""The learning rate of each step: warm-up, then a shape chosen by `lr_schedule.kind`.

Owns the shapes and their registry. The optimizer is told the rate by the trainer; nothing here has state, so
a resumed run needs nothing but its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megalm.config.run import LrScheduleSection, RunConfig
from megalm.registry import Registry

Shape = Callable[[float, LrScheduleSection], float]
"""progress in [0, 1] after the warm-up, the section -> the factor of the peak rate, in [0, 1]."""

LR_SCHEDULES: Registry[Shape] = Registry("lr_schedule")


@LR_SCHEDULES.register("cosine")
def cosine(progress: float, schedule: LrScheduleSection) -> float:
    """Return half a cosine from 1 down to `min_lr_ratio`. Source: Loshchilov and Hutter 2017, equation 5."""
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


@LR_SCHEDULES.register("constant")
def constant(progress: float, schedule: LrScheduleSection) -> float:
    """Return 1: the peak rate until the end."""
    return 1.0


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Warm-up: `optim.lr * (step + 1) / warmup_steps`, which reaches `optim.lr` in its last step. After it the
    shape runs over the steps that remain of `train.steps` (never of `train.stop_at`: a run that stops early
    keeps its schedule) and stays at its end beyond them.
    """
    schedule = config.lr_schedule
    if step < schedule.warmup_steps:
        return config.optim.lr * (step + 1) / schedule.warmup_steps
    remaining = max(1, config.train.steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / remaining)
    return config.optim.lr * LR_SCHEDULES.get(schedule.kind)(progress, schedule)
