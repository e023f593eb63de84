"""One training step, and the loop around it.

Owns the way of a batch: read, split, schedule, reduce, update. What happens after a step (metrics,
evaluation, checkpoints) is a list of callbacks; what the parts are made of is decided in `pretrain`.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.data.loader import Batch, Loader
from megalm.distributed.collectives import all_reduce_sum
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import progress
from megalm.errors import MegalmError
from megalm.nn.dropout import DropoutKeys
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor
from megalm.train.interruption import Interruption
from megalm.train.lr_schedules import learning_rate
from megalm.zero.engine import ZeroEngine


@dataclass
class TrainState:
    """How far a run has come; all that a resumed run needs beside weights and optimizer state."""

    step: int = 0
    """Updates made."""
    samples: int = 0
    """Sequences of the global order that have been used; the next one has this number."""
    tokens: int = 0
    """Tokens of those sequences."""


@dataclass(frozen=True)
class StepResult:
    """What a step gives: `loss_sum` (this rank's part; on the last stage only), the whole batch's valid tokens."""

    loss_sum: Tensor
    valid_tokens: Tensor
    grad_norm: float
    lr: float


class Callback(Protocol):
    """Something to do after steps. Every rank calls every callback in the same order, so it may communicate."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Run after the update; `trainer.state` counts the step already."""

    def at_end(self, trainer: Trainer) -> None:
        """Run once, after the last step, also where there was none left to do, or after an interruption before it."""


class Trainer:
    """Trains one rank's stage; all ranks of the mesh must step together."""

    def __init__(
        self,
        config: RunConfig,
        mesh: ParallelMesh,
        executor: PipelineExecutor,
        engine: ZeroEngine,
        loader: Loader,
        state: TrainState,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.executor = executor
        self.engine = engine
        self.loader = loader
        self.state = state

    @property
    def last_step(self) -> int:
        """The number of steps after which this run ends."""
        train = self.config.train
        return train.steps if train.stop_at is None else min(train.stop_at, train.steps)

    def fit(self, callbacks: Sequence[Callback], interruption: Interruption | None = None) -> signal.Signals | None:
        """Train up to `last_step` and return None, or until all ranks know of an interruption and return its signal."""
        interrupted = None
        while self.state.step < self.last_step and interrupted is None:
            result = self.train_step()
            for callback in callbacks:
                callback.after_step(self, result)
            if interruption is not None:
                interrupted = interruption.agreed(self.mesh.device)
        for callback in callbacks:
            callback.at_end(self)
        return interrupted if self.state.step < self.last_step else None

    def train_step(self) -> StepResult:
        """Use the next global batch for one update of the weights.

        The loss is the mean over the valid tokens of the *global* batch, so it does not depend on how the
        batch is split into microbatches and data ranks. Raises MegalmError when the gradient is not finite.
        """
        step, global_batch = self.state.step + 1, self.config.train.global_batch
        progress.enter(step, "data")
        batch = self.loader.batch(self.state.samples, global_batch)
        microbatches = self._split(batch)
        valid_tokens = batch.loss_mask_BT.sum(dtype=torch.float64).to(self.mesh.device)
        valid_tokens = all_reduce_sum(valid_tokens, self.mesh.group("data"))
        progress.enter(step, "forward and backward")
        loss_sum = self.executor.run(microbatches, self.engine.loss_factor / valid_tokens, self.engine.microbatch_done)
        progress.enter(step, "gradient reduction")
        self.engine.reduce()
        progress.enter(step, "update")
        lr = learning_rate(self.config, self.state.step)
        grad_norm = self.engine.update(lr)
        if not math.isfinite(grad_norm):
            raise MegalmError(
                f"step {step}: the gradient norm is {grad_norm}, no update was made; "
                "lower optim.lr, lengthen lr_schedule.warmup_steps, or look at the data of this step"
            )
        progress.enter(step, "after the step")
        self.state.step = step
        self.state.samples += global_batch
        self.state.tokens += global_batch * self.config.model.sequence
        return StepResult(loss_sum, valid_tokens, grad_norm, lr)

    def mean_loss(self, result: StepResult) -> float:
        """Return the step's loss per valid token of the global batch, on every rank; waits for the device."""
        total = all_reduce_sum(result.loss_sum.double(), self.mesh.group("data"))
        total = all_reduce_sum(total, self.mesh.group("pipeline"))
        return (total / result.valid_tokens).item()

    def _split(self, batch: Batch) -> list[Microbatch]:
        """Return this data rank's rows as microbatches, on the device."""
        size = self.config.train.micro_batch
        rows = len(batch.tokens_BT)
        first_sample = self.mesh.coordinates.data * rows
        device = self.mesh.device
        dropped = self.config.model.dropout > 0.0
        return [
            Microbatch(
                tokens_BT=batch.tokens_BT[at : at + size].to(device, non_blocking=True),
                labels_BT=batch.labels_BT[at : at + size].to(device, non_blocking=True),
                loss_mask_BT=batch.loss_mask_BT[at : at + size].to(device, non_blocking=True),
                dropout=DropoutKeys(self.config.seed, self.state.step, first_sample + at) if dropped else None,
            )
            for at in range(0, rows, size)
        ]
