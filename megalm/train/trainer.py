"""One training step, and the loop around it.

Owns the way of a batch: read, split, schedule, reduce, update. What happens after a step (metrics, evaluation,
checkpoints) is a list of callbacks, what becomes of a run whose steps go wrong is `recovery`'s; what the parts are made
of is decided in `pretrain`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megalm.config.ramps import batch_at, rows_of_rank, sequence_at
from megalm.config.run import RunConfig
from megalm.data.loader import Batch, Loader
from megalm.distributed.collectives import all_reduce_sum
from megalm.distributed.communication_time import CommunicationClock
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.progress import progress
from megalm.errors import MegalmError
from megalm.nn.masks import DropoutKeys
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor
from megalm.train.experts import ExpertBalance
from megalm.train.gradients import condition_gradients, scale_gradients
from megalm.train.interruption import Interruption
from megalm.train.loss_scale import follow
from megalm.train.lr_schedules import learning_rate
from megalm.train.stability import why_wrong
from megalm.zero.engine import ZeroEngine


@dataclass
class TrainState:
    """How far a run has come; all that a resumed run needs beside weights and optimizer state."""

    step: int = 0
    """Global batches that were used for an update or skipped."""
    samples: int = 0
    """Sequences, of full length, of the global order that have been used; the next one has this number."""
    tokens: int = 0
    """Tokens of those sequences."""
    planned: int = 0
    """Sequences that `step` steps take where none is undone: `samples` but for those that rollbacks passed over."""
    skipped: int = 0
    """Steps among `step` that made no update."""
    skipped_steps: list[int] = field(default_factory=list)
    """The last few of them."""
    rollbacks: int = 0
    """How often the run went back to an earlier checkpoint, in its last trouble."""
    left_at: int = 0
    """The step from which it last went back."""
    went_to: int = 0
    """The step to which it went."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps that made an update, oldest first; a spike is told by them."""
    loss_scale: float | None = None
    """Of the next step under precision fp16; None under others."""
    clean_steps: int = 0
    """Steps without overflow since the loss scale was last changed."""
    watched: str | None = None
    """The metric of `early_stop` whose values the next two are about."""
    best: float | None = None
    """Its least value so far."""
    not_better: int = 0
    """Its values since then."""

    @property
    def updates(self) -> int:
        """Updates made."""
        return self.step - self.skipped


@dataclass(frozen=True)
class StepTimes:
    """The seconds of this rank's step: reading the batch, standing in communication, and all the rest."""

    data_s: float
    communication_s: float
    compute_s: float


@dataclass(frozen=True)
class StepResult:
    """What a step gives; all but the times is the same on every rank."""

    loss: float
    """Per valid token of the global batch."""
    grad_norm: float
    """Before clipping; NaN where the loss was reason enough to skip the step, not finite where fp16 overflowed."""
    lr: float
    wrong: str | None
    """Why the step made no update; None: it made one, or is to be tried with a smaller loss scale."""
    times: StepTimes
    loss_scale: float | None = None
    """That of its gradients, which is taken out again; None: the precision needs none."""

    @property
    def updated(self) -> bool:
        """Whether the step made an update."""
        return self.wrong is None and math.isfinite(self.grad_norm)


class Callback(Protocol):
    """Something to do after steps. Every rank calls every callback in the same order, so it may communicate."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Run after the update; `trainer.state` counts the step already."""

    def at_end(self, trainer: Trainer) -> None:
        """Run once, after the last step, also where there was none left to do, or after an interruption before it."""


class Recovery(Protocol):
    """Decides what becomes of a run whose steps go wrong; it may communicate, as every rank calls."""

    def after_wrong_step(self, trainer: Trainer, result: StepResult) -> bool:
        """Take note of a step that made no update; return whether the run is at an earlier step now."""


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
        clock: CommunicationClock | None = None,
    ) -> None:
        """Without a `clock`, which must be entered, communication counts as computation."""
        self.config = config
        self.mesh = mesh
        self.executor = executor
        self.engine = engine
        self.loader = loader
        self.state = state
        self.clock = clock
        self.experts = ExpertBalance(config, mesh, engine.module)
        if config.precision == "fp16" and state.loss_scale is None:
            state.loss_scale = config.loss_scale.initial
        self.before_step: list[Callable[[Trainer], None]] = []
        """Called before a step, on every rank in the same order; `state` does not count the step yet."""
        self.before_update: list[Callable[[Trainer], None]] = []
        """Called between reduction and update, on every rank in the same order."""

    @property
    def last_step(self) -> int:
        """The number of steps after which this run ends; those that are done where it is to stop early."""
        state, early, stop_at = self.state, self.config.early_stop, self.config.train.stop_at
        if early.metric is not None and state.watched == early.metric and state.not_better >= early.patience:
            return state.step
        return self.config.steps if stop_at is None else min(stop_at, self.config.steps)

    def fit(
        self,
        callbacks: Sequence[Callback],
        interruption: Interruption | None = None,
        recovery: Recovery | None = None,
    ) -> signal.Signals | None:
        """Train up to `last_step` and return None, or until all ranks know of an interruption and return its signal.

        Without a `recovery` a step that goes wrong raises MegalmError.
        """
        interrupted = None
        while self.state.step < self.last_step and interrupted is None:
            result = self.train_step()
            if result.wrong is not None:
                if recovery is None:
                    raise MegalmError(f"step {self.state.step}: {result.wrong}, no update was made")
                if recovery.after_wrong_step(self, result):
                    continue  # the step is undone, there is nothing to do after it
            for callback in callbacks:
                callback.after_step(self, result)
            if interruption is not None:
                interrupted = interruption.agreed(self.mesh.device)
        for callback in callbacks:
            callback.at_end(self)
        return interrupted if self.state.step < self.last_step else None

    def train_step(self) -> StepResult:
        """Use the next global batch for one update of the weights, or for none if something is wrong with it.

        The loss is the mean over the valid tokens of the *global* batch, so it does not depend on how the
        batch is split into microbatches and data ranks.
        """
        for look in self.before_step:
            look(self)
        state = self.state
        step, global_batch, used_scale = state.step + 1, batch_at(self.config, state.step), state.loss_scale
        progress.enter(step, "data")
        self._communication_s()  # what happened since the last step is none of this one
        begin = time.perf_counter()
        cuts = self.config.model.sequence // sequence_at(self.config, state.step)
        rows = rows_of_rank(self.config, global_batch, self.mesh.size("data"))
        batch = self.loader.batch(state.samples, global_batch, rows).cut(cuts)
        microbatches = self._split(batch, self.config.train.micro_batch * cuts)
        data_s = time.perf_counter() - begin
        valid_tokens = batch.loss_mask_BT.sum(dtype=torch.float64).to(self.mesh.device)
        valid_tokens = all_reduce_sum(valid_tokens, self.mesh.group("data"))
        progress.enter(step, "forward and backward")
        scale, rest = self.loss_factors()
        self.experts.begin(scale / valid_tokens)
        self.engine.begin(len(microbatches))
        loss_sum = self.executor.run(microbatches, scale / valid_tokens, self.engine.microbatch_done)
        self.experts.end()
        progress.enter(step, "gradient reduction")
        self.engine.reduce()
        scale_gradients(self.engine, rest)
        loss = self._mean_loss(loss_sum, valid_tokens)
        wrong = why_wrong(loss, state.losses, self.config.stability)
        for look in self.before_update:
            look(self)
        progress.enter(step, "update")
        lr = learning_rate(self.config, state.step)
        if wrong is None:
            condition_gradients(self.engine, self.config, self.mesh)
            grad_norm = self.engine.update(lr)
            updated = math.isfinite(grad_norm)
            excused = state.loss_scale is not None and follow(state, self.config.loss_scale, not updated)
            wrong = None if updated or excused else f"the gradient norm is {grad_norm}"
            if updated:
                self.experts.move_biases()
            if updated and self.config.optim.ema_decay is not None:
                self.engine.average(self.config.optim.ema_decay)
        else:
            grad_norm, updated = math.nan, False
            self.engine.discard()
        progress.enter(step, "after the step")
        state.step = step
        state.samples += global_batch
        state.planned += global_batch
        state.tokens += global_batch * self.config.model.sequence
        if updated:
            state.losses = [*state.losses, loss][-self.config.stability.spike_window :]
        else:
            state.skipped += 1
        step_s, communication_s = time.perf_counter() - begin, self._communication_s()
        times = StepTimes(data_s, communication_s, max(0.0, step_s - data_s - communication_s))
        return StepResult(loss, grad_norm, lr, wrong, times, used_scale)

    def loss_factors(self) -> tuple[float, float]:
        """Return the factor of the loss, and the one that then makes true gradients of those that are reduced.

        Under fp16 the engine's own factor is left to the end: whether gradients overflow must not depend on it.
        """
        factor, scale = self.engine.loss_factor, self.state.loss_scale
        return (factor, 1.0) if scale is None else (scale, factor / scale)

    def _communication_s(self) -> float:
        return self.clock.take() if self.clock is not None else 0.0

    def _mean_loss(self, loss_sum: Tensor, valid_tokens: Tensor) -> float:
        """Return the step's loss, the same bits on every rank of the world; waits for the device.

        The ranks of the last stage's tensor axis all count, as one that is not finite there must be seen by all.
        """
        total = all_reduce_sum(loss_sum.double(), world_group())
        return (total / (self.mesh.size("tensor") * valid_tokens)).item()

    def _split(self, batch: Batch, size: int) -> list[Microbatch]:
        """Return this data rank's rows as microbatches of `size` rows, on the device."""
        rows = len(batch.tokens_BT)
        first_sample = self.mesh.coordinates.data * rows
        device = self.mesh.device
        model, seed, step = self.config.model, self.config.seed, self.state.step
        return [
            Microbatch(
                tokens_BT=batch.tokens_BT[at : at + size].to(device, non_blocking=True),
                labels_BT=batch.labels_BT[at : at + size].to(device, non_blocking=True),
                loss_mask_BT=batch.loss_mask_BT[at : at + size].to(device, non_blocking=True),
                dropout=DropoutKeys(seed, step, first_sample + at) if model.draws_masks else None,
            )
            for at in range(0, rows, size)
        ]
