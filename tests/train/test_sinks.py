"""Sinks of the metrics: what they hold after resumes and rollbacks, and that none can stop or slow a run."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalm.config.run import RunConfig
from megalm.train import sinks
from megalm.train.metrics_file import read_events, read_metrics
from megalm.train.sinks import SINKS, Record, Sinks
from megalm.train.tracking import Tracker
from tests.end_to_end.workplace import environment, make_workplace
from tests.train.recipes import small_recipe
from tests.train.test_tracking import EVALUATION, step_record


class Notebook:
    """A sink that notes what it is told, and fails at a step that is told it."""

    def __init__(self, run_dir: Path, resume_step: int, config: RunConfig) -> None:
        self.notes: list[Any] = [resume_step]
        self.fails_at = -1
        BOOKS.append(self)

    def write(self, record: Record) -> None:
        if record["step"] == self.fails_at:
            raise OSError(28, "No space left on device")
        self.notes.append(dict(record))

    def rewind(self, step: int) -> None:
        self.notes.append(step)

    def close(self) -> None:
        self.notes.append("closed")


BOOKS: list[Notebook] = []


@pytest.fixture(autouse=True)
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Notebook]]:
    """Let both names stand for notebooks; tests of the real sinks take their processes' own."""
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(SINKS._entries, name, Notebook)
    yield BOOKS
    BOOKS.clear()


def tracker_of(run: Path, resume_step: int = 0) -> Tracker:
    feeds = Sinks(("tensorboard", "wandb"), run, resume_step, small_recipe())
    return Tracker(run, resume_step, 10, active=True, sinks=feeds)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sinks_get_the_figures_of_the_metrics_file_and_no_step_twice(tmp_path: Path, books: list[Notebook]) -> None:
    tracker = tracker_of(tmp_path)
    for step in range(1, 5):
        tracker.log_step(step_record(step), 1.0)
    tracker.event({"step": 4, "event": "skipped step"})
    tracker.log_evaluation(EVALUATION)
    tracker.rewind(2)
    tracker.log_step(step_record(3), 1.0)
    tracker.close()
    tracker.close()
    figures = [step_record(step) for step in range(1, 5)]
    assert [book.notes for book in books] == 2 * [[0, *figures, EVALUATION, 2, figures[2], "closed"]]
    books.clear()
    tracker = tracker_of(tmp_path, 3)
    tracker.log_step(step_record(3), 1.0)  # stands there already, as the evaluation of a finished run does
    tracker.close()
    assert [book.notes for book in books] == 2 * [[3, "closed"]]


def test_a_sink_that_fails_is_named_once_and_left_out(tmp_path: Path, books: list[Notebook]) -> None:
    tracker = tracker_of(tmp_path)
    wait_for(lambda: len(books) == 2)
    books[0].fails_at = 2
    for step in range(1, 6):
        tracker.log_step(step_record(step), 1.0)
        wait_for(lambda step=step: any(step_record(step) in book.notes for book in books))
        time.sleep(0.05)
    tracker.close()
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert event["event"] == "sink failed" and event["sink"] in ("tensorboard", "wandb")
    assert event["reason"] == "OSError: [Errno 28] No space left on device"
    assert books[0].notes == [0, step_record(1)]
    assert books[1].notes == [0, *(step_record(step) for step in range(1, 6)), "closed"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_sink_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "CLOSE_S", 0.2)
    monkeypatch.setattr(sinks, "WAITING", 20)
    release = threading.Event()
    monkeypatch.setattr(Notebook, "write", lambda self, record: release.wait(60))
    for steps, reason in (
        (5, "it did not take its last figures within 0.2 s"),
        (30, "it does not keep up, 20 records"),
    ):
        run = tmp_path / str(steps)
        run.mkdir()
        tracker = tracker_of(run)
        begin = time.monotonic()
        for step in range(1, steps + 1):
            tracker.log_step(step_record(step), 1.0)
        tracker.close()
        assert time.monotonic() - begin < 10
        events = read_events(run / "metrics.jsonl")
        assert len(events) == 2 and all(event["reason"].startswith(reason) for event in events), events
        assert len(read_metrics(run / "metrics.jsonl")) == steps
    release.set()


def test_a_package_that_cannot_be_imported_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS._entries, "wandb", sinks.WeightsAndBiases)
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = tracker_of(tmp_path)
    tracker.log_step(step_record(1), 1.0)
    tracker.close()
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert event["sink"] == "wandb" and "ModuleNotFoundError" in event["reason"]


def train_with_a_rollback(place: Path, sink: str) -> list[dict[str, float]]:
    """Train 40 steps that go back from 26 to 20, killed at 35 and resumed at 30; return the lines of metrics."""
    settings = ("stability.spike_window=8", "checkpoint.every=10", "evaluate.every=10", f"log.sinks=[{sink}]")
    command = [sys.executable, "-m", "tests.train.poisoned", "labels", "92", "104", "recipe.yaml", *settings]
    for more in (["checkpoint.at_end=false", "train.stop_at=35"], []):
        done = subprocess.run(
            [*command, *more], cwd=place, env={**environment(), "WANDB_MODE": "offline"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "went back" in done.stdout.lower() or not more
    assert "resuming run/checkpoints/step-00000030" in done.stdout
    events = read_events(place / "run" / "metrics.jsonl")
    assert "sink failed" not in [event["event"] for event in events], events
    return read_metrics(place / "run" / "metrics.jsonl")


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_a_rollback_and_a_resume(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    records = train_with_a_rollback(make_workplace(tmp_path / "place"), "tensorboard")
    shown = reader.EventAccumulator(str(tmp_path / "place" / "run" / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    assert set(shown.Tags()["scalars"]) == {tag for record in records for tag in record} - {"step"}
    for tag in ("train/loss", "tokens", "evaluate/loss", "optim/grad_norm"):
        curve = [(event.step, event.value) for event in shown.Scalars(tag)]
        expected = [(record["step"], record[tag]) for record in records if tag in record]
        assert [step for step, _ in curve] == [step for step, _ in expected]
        assert [value for _, value in curve] == pytest.approx([value for _, value in expected], rel=1e-6)


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run's file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    content, at, text = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        text += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield WandbRecord.FromString(text)
            text = b""


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run_at_the_right_step(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    records = train_with_a_rollback(make_workplace(tmp_path / "place"), "wandb")
    run_id = (tmp_path / "place/run/wandb/run-id").read_text().strip()
    steps: dict[int, float] = {}
    begun = []
    for path in sorted(
        tmp_path.glob(f"place/run/wandb/offline-run-*-{run_id}/*.wandb"), key=lambda p: p.stat().st_mtime
    ):
        for record in wandb_records(path):
            if record.HasField("run"):
                branch = record.run.branch_point
                begun.append((record.run.run_id, int(branch.value) if branch.run else None))
                steps = {step: loss for step, loss in steps.items() if branch.run and step <= branch.value}
            for item in record.history.item:
                if "train/loss" in (item.key, *item.nested_key):
                    steps[record.history.step.num] = float(item.value_json)
    assert list(dict.fromkeys(begun)) == [(run_id, None), (run_id, 20), (run_id, 30)]
    assert steps == {int(record["step"]): record["train/loss"] for record in records if "train/loss" in record}
