"""What happens after a step: metrics, evaluation, early stopping. A new habit is one class here; `saving` has another.

The trainer calls them in the order in which `pretrain` lists them, on every rank alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megalm.config.ramps import batch_at, sequence_at
from megalm.config.run import EarlyStopSection, RunConfig
from megalm.data.loader import HeldOut
from megalm.distributed.collectives import all_reduce_sum
from megalm.distributed.mesh import world_group
from megalm.evaluation.perplexity import HeldOutLoss, held_out_loss
from megalm.models.transformer import Transformer
from megalm.train.memory import Memory
from megalm.train.monitor import Throughput
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, StepTimes, Trainer

_PARTS = [field.name for field in fields(StepTimes)]


class LogMetrics:
    """Write and show the metrics of every `every`-th step, of the first one and of the last one."""

    def __init__(self, tracker: Tracker, meter: Throughput, memory: Memory, every: int) -> None:
        self.tracker = tracker
        self.meter = meter
        self.memory = memory
        self.every = every
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        """What else belongs to a line, of the time since the last one."""
        self.record: dict[str, float] = {}
        """What was logged last."""
        self._times: deque[StepTimes] = deque(maxlen=every)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Log, where the step is to be logged; the parts of the step's time are this rank's, hence rank 0's."""
        step = trainer.state.step
        self._times.append(result.times)
        further_sums = _taken(trainer)
        if step % self.every and step != trainer.last_step and step != 1:
            return
        speed = self.meter.measure(step, trainer.last_step)
        record: dict[str, float] = {
            "step": step,
            "tokens": trainer.state.tokens,
            **_sizes(trainer.config, step),
            "train/loss": result.loss,
            **({} if further_sums is None else {"train/mtp_loss": _mean(further_sums)}),
            "optim/lr": result.lr,
            "optim/grad_norm": result.grad_norm,
            **({} if result.loss_scale is None else {"optim/loss_scale": result.loss_scale}),
            **trainer.experts.record(),
            **speed.record(),
            **{f"time/{name}": fmean(getattr(times, name) for times in self._times) for name in _PARTS},
            **self.memory.record(),
        }
        for source in self.sources:
            record |= source()
        self.record = record
        self._times.clear()
        self.tracker.log_step(record, speed.time_left_s)

    def at_end(self, trainer: Trainer) -> None:
        """Nothing is left over: the last step is always logged, and those before an interruption soon will be."""


class Evaluate:
    """Measure the loss on held-out text every `every` steps (0: only at the end), of the averaged weights too."""

    def __init__(
        self,
        tracker: Tracker,
        meter: Throughput,
        model: Transformer,
        held_out: HeldOut,
        token_bytes_V: NDArray[np.int64],
        every: int,
    ) -> None:
        self.tracker = tracker
        self.meter = meter
        self.model = model
        self.held_out = held_out
        self.token_bytes_V = token_bytes_V
        self.every = every
        self._done_at = -1
        self.record: dict[str, float] = {"step": -1}
        """What was measured last."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate where the step is a multiple of `every`."""
        if self.every and trainer.state.step % self.every == 0:
            self._evaluate(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Evaluate the final weights, unless that was just done; after an interruption time is short."""
        if self._done_at != trainer.state.step == trainer.last_step:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        record: dict[str, float] = {"step": trainer.state.step}
        with self.meter.paused():
            record |= self._measure(trainer).record()
            if trainer.config.optim.ema_decay is not None and trainer.state.updates:
                with trainer.engine.averaged_weights():
                    record |= self._measure(trainer).record("evaluate/ema_")
        self._done_at = trainer.state.step
        self.record = record
        self.tracker.log_evaluation(record)

    def _measure(self, trainer: Trainer) -> HeldOutLoss:
        return held_out_loss(
            trainer.executor,
            self.model,
            self.held_out,
            self.token_bytes_V,
            trainer.mesh,
            trainer.config.train.micro_batch,
        )


class StopEarly:
    """Tells the trainer's state of each new value of the metric that is watched; stands behind the evaluation."""

    def __init__(self, tracker: Tracker, evaluate: Evaluate, section: EarlyStopSection) -> None:
        self.tracker = tracker
        self.evaluate = evaluate
        self.section = section

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Look at the metric, if this step gave it a value; each rank sees the same."""
        state, metric = trainer.state, self.section.metric
        value = value_at(metric, state.step, result, self.evaluate.record)
        if metric is None or value is None:
            return
        if state.watched != metric:
            state.watched, state.best, state.not_better = metric, None, 0
        least = math.inf if state.best is None else state.best
        if value < least - self.section.min_delta:
            state.best, state.not_better = value, 0
            return
        state.not_better += 1
        if state.not_better == self.section.patience:
            facts: dict[str, str | float] = {"metric": metric, "best": least, "values since": state.not_better}
            self.tracker.event({"step": state.step, "event": "early stop", **facts})

    def at_end(self, trainer: Trainer) -> None:
        """Nothing is left over."""


def value_at(metric: str | None, step: int, result: StepResult, evaluated: Mapping[str, float]) -> float | None:
    """Return the value that a step gave a metric; None where it is none of this step's. `evaluated`: the last one."""
    own = {"train/loss": result.loss, "optim/grad_norm": result.grad_norm}
    measured = evaluated if evaluated["step"] == step else {}
    return {**own, **measured}.get(metric or "")


def _sizes(config: RunConfig, step: int) -> dict[str, int]:
    """Return the batch and the length of the sequences of step number `step`, from 1, where they grow."""
    record = {}
    if config.batch_ramp.start is not None:
        record["train/global_batch"] = batch_at(config, step - 1)
    if config.sequence_warmup.start is not None:
        record["train/sequence"] = sequence_at(config, step - 1)
    return record


def _taken(trainer: Trainer) -> Tensor | None:
    """Return this rank's sums of further tokens' losses since the last call; None where none are predicted."""
    if trainer.config.model.mtp_depth == 0:
        return None
    model: Any = trainer.engine.module
    sums: Tensor = model.further_sums.clone()
    model.further_sums.zero_()
    return sums


def _mean(sums: Tensor) -> float:
    """Return the quotient of the two sums over the world, where all tensor ranks of the last stage count alike."""
    total, count = all_reduce_sum(sums, world_group()).tolist()
    return total / count if count else math.nan
