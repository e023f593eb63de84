"""Where a run's figures go beside `metrics.jsonl`: TensorBoard, Weights & Biases. A new sink is one class here.

A disk fills and a network goes, so a sink is served by a thread of its own, through a queue: the training neither waits
for it nor ends with it. One that fails is named once and left out from then on. A sink's package is imported in that
thread, where the recipe asks for it (`log.sinks`); it has the sink's name, by which `launch.checks` looks for it.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Protocol

from megalm.config.run import RunConfig
from megalm.errors import MegalmError
from megalm.files import write_durably
from megalm.registry import Registry

WAITING = 10_000
"""A sink for which so many records wait does not keep up, and is left out."""
CLOSE_S = 20.0
"""How long the end of a run waits for its sinks."""

Record = Mapping[str, float | int]


class Sink(Protocol):
    """Takes the figures of a run in its own thread: each method may take its time, and may raise anything."""

    def write(self, record: Record) -> None:
        """Take the figures of the step `record["step"]`."""

    def rewind(self, step: int) -> None:
        """Forget the figures of later steps, which are about to be done again."""

    def close(self) -> None:
        """Bring everything to where it belongs."""


SINKS: Registry[Callable[[Path, int, RunConfig], Sink]] = Registry("sink")
"""Each is called with the run's directory, the step at which the run goes on, and its recipe."""


class Sinks:
    """All sinks of a run; no method waits for them but `close`, and none raises."""

    def __init__(self, names: tuple[str, ...], run_dir: Path, resume_step: int, config: RunConfig) -> None:
        self._feeds = [_Feed(name, run_dir, resume_step, config) for name in names]

    def write(self, record: Record) -> None:
        """Hand the figures of a step to every sink."""
        for feed in self._feeds:
            feed.put(methodcaller("write", dict(record)))

    def rewind(self, step: int) -> None:
        """Have every sink forget the figures of later steps."""
        for feed in self._feeds:
            feed.put(methodcaller("rewind", step))

    def failed(self) -> Iterator[tuple[str, str]]:
        """Leave out the sinks that have failed; yield the name of each, and why."""
        failed = [feed for feed in self._feeds if feed.failure is not None]
        self._feeds = [feed for feed in self._feeds if feed not in failed]
        yield from ((feed.name, feed.failure or "") for feed in failed)

    def close(self) -> None:
        """Let the sinks finish for `CLOSE_S` together at most; `failed` then tells of those that did not."""
        for feed in self._feeds:
            feed.put(None)
        deadline = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.join(deadline)


class _Feed:
    """One sink, its queue and its thread, a daemon: one that hangs does not keep the process."""

    def __init__(self, name: str, run_dir: Path, resume_step: int, config: RunConfig) -> None:
        self.name = name
        self.failure: str | None = None
        self._jobs: Queue[Callable[[Sink], None] | None] = Queue(WAITING)
        self._thread = Thread(target=self._serve, args=(run_dir, resume_step, config), name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Sink], None] | None) -> None:
        """Have the sink do something when it comes to it; None: finish."""
        try:
            self._jobs.put_nowait(job)
        except Full:
            self.failure = f"it does not keep up, {WAITING} records wait for it"

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.failure = f"it did not take its last figures within {CLOSE_S:g} s"

    def _serve(self, run_dir: Path, resume_step: int, config: RunConfig) -> None:
        try:
            sink = SINKS.get(self.name)(run_dir, resume_step, config)
            while self.failure is None and (job := self._jobs.get()) is not None:
                job(sink)
            sink.close()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"


@SINKS.register("tensorboard")
class TensorBoard:
    """Event files in the run's `tensorboard/`, one a start of the run; each record is on the disk when it is written.

    A START event makes TensorBoard drop what it has read of that step and later ones, in earlier files too.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: RunConfig) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory = run_dir / "tensorboard"
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("ab"))
        self._event = Event
        self._add(file_version="brain.Event:2")
        self.rewind(resume_step)

    def write(self, record: Record) -> None:
        values = [{"tag": tag, "simple_value": value} for tag, value in record.items() if tag != "step"]
        self._add(step=record["step"], summary={"value": values})

    def rewind(self, step: int) -> None:
        self._add(step=step + 1, session_log={"status": "START"})

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


@SINKS.register("wandb")
class WeightsAndBiases:
    """A run of Weights & Biases called like the run's directory, in the project WANDB_PROJECT or else megalm.

    Its id lies in the run's `wandb/run-id`, by which it goes on at the right step after a resume or a rollback.
    WANDB_MODE=offline writes to `wandb/` alone.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: RunConfig) -> None:
        import wandb

        self._wandb, self._run_dir, self._config = wandb, run_dir, config
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise MegalmError("no API key; give one with `wandb login`, or set WANDB_MODE=offline")
        (run_dir / "wandb").mkdir(exist_ok=True)
        id_file = run_dir / "wandb" / "run-id"
        if resume_step and id_file.exists():
            self._id = id_file.read_text(encoding="utf-8").strip()
            self._run = self._open(resume_from=f"{self._id}?_step={resume_step}")
        else:
            self._id = secrets.token_hex(4)
            write_durably(id_file, f"{self._id}\n".encode())
            self._run = self._open(id=self._id)

    def _open(self, **which: str) -> Any:
        settings = self._wandb.Settings(console="off", silent=True, finish_timeout=CLOSE_S)
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megalm"),
            name=self._run_dir.resolve().name,
            dir=str(self._run_dir),
            config=self._config.model_dump(mode="json"),
            settings=settings,
            **which,
        )

    def write(self, record: Record) -> None:
        self._run.log({tag: value for tag, value in record.items() if tag != "step"}, step=record["step"])

    def rewind(self, step: int) -> None:
        self._run.finish()
        which = {"resume_from": f"{self._id}?_step={step}"} if step else {"id": self._id}
        self._run = self._open(**which)

    def close(self) -> None:
        self._run.finish()
