"""Which steps are wrong: those whose batch must not reach the weights. No torch.

Source: OLMo 2, 2025 (steps whose loss lies more than 6 standard deviations above the last ones are skipped).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megalm.config.run import StabilitySection

_LEAST_DEVIATION = 1e-3  # of the mean: losses that hardly move would make a spike of anything


def why_wrong(loss: float, losses: Sequence[float], settings: StabilitySection) -> str | None:
    """Return why a step of this loss is to make no update, after steps of `losses`; None where all is well.

    A spike is looked for once half of the window is filled.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not settings.spike_sigma or len(losses) < settings.spike_window / 2:
        return None
    mean = statistics.fmean(losses)
    deviation = max(statistics.pstdev(losses, mean), _LEAST_DEVIATION * abs(mean))
    if loss <= mean + settings.spike_sigma * deviation:
        return None
    return (
        f"the loss is {loss:.4f}, {(loss - mean) / deviation:.1f} standard deviations above the mean {mean:.4f} "
        f"of the last {len(losses)} steps"
    )
