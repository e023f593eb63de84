"""How large a step's batch is, and how long its sequences are: functions of the step's number alone. No torch.

So they are the same in every layout and need no state: a resumed run finds them by its step. Steps count from 0 here.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


def batch_at(config: RunConfig, step: int) -> int:
    """Return the sequences, of full length, of the global batch of a step."""
    start, increment, every = _batch_ramp(config)
    return min(config.train.global_batch, start + step // every * increment)


def rows_of_rank(config: RunConfig, batch: int, data_ranks: int) -> int:
    """Return the rows of each data rank's share of a global batch: whole microbatches, as many on each."""
    part = config.train.micro_batch
    return -(-batch // (data_ranks * part)) * part


def samples_before(config: RunConfig, step: int) -> int:
    """Return the sequences, of full length, that all steps before this one take, none of them undone."""
    start, increment, every = _batch_ramp(config)
    whole, rest = divmod(min(step, ramp_steps(config)), every)
    climbed = every * (whole * start + whole * (whole - 1) // 2 * increment) + rest * (start + whole * increment)
    return climbed + max(0, step - ramp_steps(config)) * config.train.global_batch


def steps_for(config: RunConfig, samples: int) -> int:
    """Return the number of steps that take so many sequences, whole steps being made."""
    return bisect_left(range(samples), samples, key=lambda step: samples_before(config, step))


def ramp_steps(config: RunConfig) -> int:
    """Return the number of steps before the first with the whole batch."""
    start, increment, every = _batch_ramp(config)
    return every * -(-(config.train.global_batch - start) // increment)


def sequence_at(config: RunConfig, step: int) -> int:
    """Return the tokens of each sequence of a step: a power of two of them make one of `model.sequence` tokens."""
    start, every = config.sequence_warmup.start, config.sequence_warmup.every
    if start is None or every is None or step >= sequence_steps(config):
        return config.model.sequence
    return start << step // every


def sequence_steps(config: RunConfig) -> int:
    """Return the number of steps before the first with whole sequences."""
    start, every = config.sequence_warmup.start, config.sequence_warmup.every
    if start is None or every is None:
        return 0
    return every * (config.model.sequence // start).bit_length() - every


def _batch_ramp(config: RunConfig) -> tuple[int, int, int]:
    """Return the first batch, what is added to it, and after how many steps each time."""
    ramp = config.batch_ramp
    if ramp.start is None or ramp.every is None:
        return config.train.global_batch, 1, 1
    return ramp.start, ramp.increment or ramp.start, ramp.every
