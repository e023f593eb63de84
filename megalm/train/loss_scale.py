"""The loss scale of fp16, which lifts small gradients above what fp16 cannot hold (Micikevicius et al. 2018). No torch.

It is a part of a run's progress, so that a resumed run goes on with it.
"""

from __future__ import annotations

from typing import Protocol

from megalm.config.run import LossScaleSection

LARGEST = 2.0**40
"""Beyond that nothing is gained, and nothing would stop the growth of a scale over gradients that are all zero."""


class Scaled(Protocol):
    """What keeps the scale of a run."""

    loss_scale: float | None
    """Of the next step; None: the precision needs none."""
    clean_steps: int
    """Steps without overflow since the scale was last changed."""


def follow(state: Scaled, settings: LossScaleSection, overflowed: bool) -> bool:
    """Set the scale of the next step; return whether an overflow is excused: a smaller scale may do without.

    It is halved after an overflow, down to the minimum, and doubled after `window` steps in a row without.
    """
    assert state.loss_scale is not None
    before = state.loss_scale
    state.clean_steps = 0 if overflowed else state.clean_steps + 1
    if overflowed:
        state.loss_scale = max(settings.minimum, before / 2.0)
    elif state.clean_steps == settings.window:
        state.loss_scale, state.clean_steps = min(LARGEST, before * 2.0), 0
    return overflowed and state.loss_scale < before
