"""When a run is saved, what is saved of it, and what becomes of it when that fails.

Training goes on while a checkpoint is written. How a save ended is known to all ranks where they wait for it, at the
next one: so all decide alike there, after the same step. Storage faults are borne `checkpoint.failures` times in a row;
a save whose failure would end the run is waited for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from megalm.checkpoint.background import Saved
from megalm.checkpoint.manager import CheckpointManager
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.retention import METRIC
from megalm.config.run import CheckpointSection
from megalm.errors import OutOfMemory, StorageError
from megalm.train.callbacks import Evaluate, LogMetrics, value_at
from megalm.train.monitor import Throughput
from megalm.train.replicas import CompareReplicas
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)

_TELL_WAIT_S = 1.0
_QUIET_S = 60.0
"""A save that writes nothing for so long is reported, by each rank whose it is."""
_HISTORY = ("step", "tokens", "train/", "optim/", "evaluate/")
"""Figures that are the same whenever a run is made."""


class SaveCheckpoints:
    """Save the run every `every` steps (0: never) and after the last one, unless `at_end` is false."""

    def __init__(
        self,
        tracker: Tracker,
        meter: Throughput,
        manager: CheckpointManager,
        facts: Mapping[str, Any],
        replicas: CompareReplicas,
        section: CheckpointSection,
        log: LogMetrics | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.tracker = tracker
        self.meter = meter
        self.manager = manager
        self.facts = facts
        self.replicas = replicas
        self.section = section
        self.log = log
        self.evaluate = evaluate
        self.saved_step = -1
        """The step of the newest checkpoint that is there, saved or resumed from."""
        self.history: dict[str, dict[str, float]] = {}
        """The last figures of steps and of evaluations, and the best of the latter, for the checkpoint's state."""
        self._result: StepResult | None = None
        self._last: Saved | None = None
        self._failed = 0
        self._asynchronous = section.asynchronous
        self._figures: dict[str, float] = {}
        self._warned = False

    def before_update(self, trainer: Trainer) -> None:
        """Have the update wait until what is saved is copied."""
        self.manager.settle()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save where the step is a multiple of `every`; the last step is saved at the end, with its evaluation."""
        self._result = result
        step = trainer.state.step
        ended = self.manager.ended()
        if ended is not None and (ended.error is None or isinstance(ended.error, StorageError)):
            self._note(ended)
        self._watch()
        if self._is_due(step) and step < trainer.last_step:
            self.save(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Save the weights of the last step that was done, unless that was just done; always after an interruption.

        Raises StorageError where the newest save failed: whoever ends a run believes it to be saved.
        """
        self._wait()
        step = trainer.state.step
        wanted = self.section.at_end or step < trainer.last_step or self._is_due(step)
        if wanted and self.saved_step != step:
            self.save(trainer, wait=True)
        if self._last is not None and self._last.error is not None:
            raise self._last.error

    def save(self, trainer: Trainer, wait: bool = False) -> None:
        """Save the run as it stands, once the data ranks' replicas were found equal (`run.compare_replicas_every`).

        `wait`: return when that is done. Raises StorageError on all ranks where too many saves in a row have failed.
        """
        self.replicas.ensure_equal(trainer)
        begin = time.perf_counter()
        with self.meter.paused():
            self._wait()
            step, state = trainer.state.step, self._state(trainer)
            beside = self._asynchronous and not wait and self._failed < self.section.failures
            if not (beside and self._begin(trainer, state)):
                self._note(self.manager.save_patiently(step, trainer.engine.state, state))
        self._add("checkpoint/stall_s", time.perf_counter() - begin)
        if self._failed > self.section.failures:
            assert self._last is not None and self._last.error is not None
            raise self._last.error

    def _begin(self, trainer: Trainer, state: Mapping[str, Any]) -> bool:
        """Begin to save beside training; where some host has no memory for that, never again, and return False."""
        try:
            self.manager.begin(trainer.state.step, trainer.engine.state(), state)
        except OutOfMemory as error:
            self._asynchronous = False
            self.tracker.event(
                {
                    "step": trainer.state.step,
                    "event": "training waits for saves from now on",
                    "reason": str(error),
                    "remedy": "more memory, more ranks or nodes to divide it over, or checkpoint.asynchronous=false",
                }
            )
        return self._asynchronous

    def resumed(self, reader: CheckpointReader) -> None:
        """Take over what a checkpoint says of the run before it, which goes on from there."""
        self.saved_step, self.history = reader.step, dict(reader.state.get("metrics", {}))

    def went_back(self, reader: CheckpointReader) -> None:
        """Forget what was saved and measured after an earlier checkpoint, which has been taken up. Every rank calls."""
        self._wait()
        self.saved_step, self.history = -1, dict(reader.state.get("metrics", {}))

    def figures(self) -> dict[str, float]:
        """Return what saves took since the last call, for a line of metrics."""
        figures, self._figures = self._figures, {}
        return figures

    def _is_due(self, step: int) -> bool:
        return self.section.every > 0 and step % self.section.every == 0

    def _wait(self) -> None:
        """Wait for the save that is on its way; every rank calls. Raises what is no fault of storage."""
        begin = time.perf_counter()
        ended = self.manager.wait()
        waited_s = time.perf_counter() - begin
        if ended is None:
            return
        if waited_s > _TELL_WAIT_S:
            self.tracker.note(f"the checkpoint of step {ended.step} was waited for {waited_s:.1f} s")
        self._note(ended)
        self.manager.taken()

    def _note(self, ended: Saved) -> None:
        """Take notice, once, of how a save ended."""
        if ended is self._last:
            return
        self._last, self._warned = ended, False
        if ended.error is None:
            self._failed, self.saved_step = 0, ended.step
            self._add("checkpoint/write_s", ended.write_s)
            self._add("checkpoint/bytes", ended.bytes)
            self.tracker.note(f"checkpoint {ended.path}")
            return
        if not isinstance(ended.error, StorageError):
            raise ended.error
        self._failed += 1
        facts = {"failures in a row": self._failed, "tolerated": self.section.failures}
        newest = "none" if self.saved_step < 0 else str(self.saved_step)
        self.tracker.event(
            {
                "step": ended.step,
                "event": "SAVE FAILED",
                "reason": str(ended.error),
                **facts,
                "newest is of step": newest,
            }
        )

    def _watch(self) -> None:
        """Say once that a save hangs. The next one waits for it, where the watchdog ends a run that does not go on."""
        quiet_s = self.manager.quiet_s()
        if quiet_s > _QUIET_S and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the checkpoint on its way has written nothing for %.0f s on this rank; look at the file system",
                self.manager.directory,
                quiet_s,
            )

    def _add(self, name: str, value: float) -> None:
        self._figures[name] = self._figures.get(name, 0) + value

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        """Return what is saved beside tensors: facts, progress, and the figures that tell how good the weights are."""
        step = trainer.state.step
        self._look_back(step)
        state = {**self.facts, "progress": vars(trainer.state).copy(), "metrics": dict(self.history)}
        name = self.section.keep_best
        if name is not None and self._result is not None and self.evaluate is not None:
            value = value_at(name, step, self._result, self.evaluate.record)
            if value is not None:
                state[METRIC] = {"name": name, "value": value, "step": step}
        return state

    def _look_back(self, step: int) -> None:
        found = {"train": self.log and self.log.record, "evaluate": self.evaluate and self.evaluate.record}
        for name, record in found.items():
            if record and 0 <= record["step"] <= step:
                self.history[name] = {key: value for key, value in record.items() if key.startswith(_HISTORY)}
        measured, best = self.history.get("evaluate", {}), self.history.get("best", {})
        if float(measured.get("evaluate/loss", math.inf)) < float(best.get("evaluate/loss", math.inf)):
            self.history["best"] = measured
