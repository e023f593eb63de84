"""What happens after a step: metrics, evaluation, checkpoints. A new habit is one class here.

The trainer calls them in the order in which `pretrain` lists them, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megalm.checkpoint.manager import CheckpointManager
from megalm.data.loader import HeldOut
from megalm.evaluation.perplexity import held_out_loss
from megalm.models.transformer import Transformer
from megalm.train.monitor import Throughput, peak_memory_bytes
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, Trainer


class LogMetrics:
    """Write and show the metrics of every `every`-th step, of the first one and of the last one."""

    def __init__(self, tracker: Tracker, meter: Throughput, every: int) -> None:
        self.tracker = tracker
        self.meter = meter
        self.every = every

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Wait for the device and log, where the step is to be logged."""
        step = trainer.state.step
        if step % self.every and step != trainer.last_step and step != 1:
            return
        loss = trainer.mean_loss(result)
        speed = self.meter.measure(step, trainer.last_step)
        record = {
            "step": step,
            "tokens": trainer.state.tokens,
            "train/loss": loss,
            "optim/lr": result.lr,
            "optim/grad_norm": result.grad_norm,
            **speed.record(),
            "memory/peak_bytes": _most_on_any_rank(peak_memory_bytes(trainer.mesh.device), trainer),
        }
        self.tracker.log_step(record, speed.time_left_s)

    def at_end(self, trainer: Trainer) -> None:
        """Nothing is left over: the last step is always logged, and those before an interruption soon will be."""


class Evaluate:
    """Measure the loss on held-out text every `every` steps (0: only at the end)."""

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

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate where the step is a multiple of `every`."""
        if self.every and trainer.state.step % self.every == 0:
            self._evaluate(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Evaluate the final weights, unless that was just done; after an interruption time is short."""
        if self._done_at != trainer.state.step == trainer.last_step:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        with self.meter.paused():
            measured = held_out_loss(
                trainer.executor,
                self.model,
                self.held_out,
                self.token_bytes_V,
                trainer.mesh,
                trainer.config.train.micro_batch,
            )
        self._done_at = trainer.state.step
        self.tracker.log_evaluation({"step": trainer.state.step, **measured.record()})


class SaveCheckpoints:
    """Save the run every `every` steps (0: only at the end)."""

    def __init__(
        self, tracker: Tracker, meter: Throughput, manager: CheckpointManager, facts: Mapping[str, Any], every: int
    ) -> None:
        self.tracker = tracker
        self.meter = meter
        self.manager = manager
        self.facts = facts
        self.every = every
        self.saved_step = -1
        """The step of the newest checkpoint, saved or resumed from."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save where the step is a multiple of `every`."""
        if self.every and trainer.state.step % self.every == 0:
            self._save(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Save the weights of the last step that was done, unless that was just done."""
        if self.saved_step != trainer.state.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        state = {**self.facts, "progress": vars(trainer.state).copy()}
        with self.meter.paused():
            path = self.manager.save(trainer.state.step, trainer.engine.state(), state)
        self.saved_step = trainer.state.step
        self.tracker.note(f"checkpoint {path}")


def _most_on_any_rank(count: int, trainer: Trainer) -> int:
    """Return the largest of the ranks' counts."""
    most = torch.tensor(count, dtype=torch.int64, device=trainer.mesh.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most.item())
