"""A window of steps under torch's profiler: a trace for each chosen rank, with the ranges that this program names.

A trace (RUN/profile/steps-5-7.rank-0.json.gz) opens in ui.perfetto.dev. Its ranges are the phases of a step, the
forward and backward of each microbatch, and every call of torch.distributed. Nobody looks outside of the window, so
the places that name their work (`distributed.progress`) cost nothing there; and nothing that is computed changes.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megalm.config.run import ProfileSection
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import progress
from megalm.train.monitor import Throughput
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)

PROFILE_DIR = "profile"


class Ranges:
    """Makes what this process says of its work ranges of the profiler that runs."""

    def __init__(self) -> None:
        self._phase: AbstractContextManager[Any] | None = None

    def phase(self, name: str) -> None:
        """End the range of the phase before, and begin one."""
        self.end_phase()
        self._phase = record_function(name)
        self._phase.__enter__()

    def end_phase(self) -> None:
        """End the range of the last phase."""
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
        self._phase = None

    def work(self, kind: str, what: object) -> AbstractContextManager[Any]:
        """Return a range to be entered: `forward 3`, `communication all_reduce`."""
        return record_function(f"{kind} {what}")


class Profile:
    """Profiles the recipe's window of steps on this rank, if it is a chosen one.

    A callback whose `before_step` the trainer must call too, to be closed where the run fails. A run that resumes
    inside of the window profiles the rest of it. The time that writing a trace takes is not counted as training.
    """

    def __init__(self, run: Path, section: ProfileSection, mesh: ParallelMesh, tracker: Tracker, meter: Throughput):
        self.section = section
        self.directory = run / PROFILE_DIR
        self.mesh = mesh
        self.tracker = tracker
        self.meter = meter
        chosen = section.ranks is None or mesh.rank in section.ranks
        first = section.start if section.start is not None and chosen else 0
        self._window = range(first, first + section.steps) if first else range(0)
        self._first, self._last = 0, 0
        self._profiler: profile | None = None
        self._ranges = Ranges()

    def before_step(self, trainer: Trainer) -> None:
        """Begin before the window's first step."""
        if self._profiler is None and trainer.state.step + 1 in self._window:
            self._first = trainer.state.step + 1
            activities = [ProfilerActivity.CPU]
            if self.mesh.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, profile_memory=self.section.memory)
            self._profiler.start()
            progress.observer = self._ranges

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Write the trace after the window's last step."""
        self._last = trainer.state.step
        if self._last + 1 not in self._window:
            self.close()

    def at_end(self, trainer: Trainer) -> None:
        """Write what there is: an interruption may come inside of the window."""
        self.close()

    def close(self) -> None:
        """Stop the profiler, if it runs, and write its trace. A disk that refuses it is no reason to end the run."""
        if self._profiler is None:
            return
        progress.observer = None
        self._ranges.end_phase()
        profiler, self._profiler = self._profiler, None
        path = self.directory / f"steps-{self._first}-{self._last}.rank-{self.mesh.rank}.json.gz"
        with self.meter.paused():
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
            profiler.stop()
            try:
                self.directory.mkdir(exist_ok=True)
                profiler.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:
                logger.warning("%s cannot be written: %s", path, error)
                return
        self.tracker.note(f"profile {path}")
