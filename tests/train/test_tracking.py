"""metrics.jsonl after kills and resumes, and the console's two faces."""

from __future__ import annotations

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import StorageError
from megalm.train import metrics_file
from megalm.train.metrics_file import MetricsFile, read_events, read_metrics
from megalm.train.tracking import Console, Tracker, format_bytes, format_count, format_time

EVALUATION = {"step": 4, "evaluate/loss": 4.2, "evaluate/perplexity": 66.7, "evaluate/bits_per_byte": 2.1}


def step_record(step: int, loss: float = 5.0) -> dict[str, float | int]:
    return {
        "step": step, "tokens": step * 64, "train/loss": loss, "optim/lr": 1e-3, "optim/grad_norm": 0.7,
        "time/step_s": 0.1, "perf/tokens_per_s": 640.0, "perf/tflops": 0.002, "perf/mfu": 0.3,
        "memory/peak_bytes": 2**28,
    }  # fmt: skip


def write_steps(directory: Path, resume_step: int, steps: range) -> None:
    metrics = MetricsFile(directory, resume_step)
    for step in steps:
        metrics.write(step_record(step))
    metrics.close()


def steps_in(directory: Path) -> list[float]:
    return [record["step"] for record in read_metrics(directory / "metrics.jsonl")]


def test_each_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(step_record(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == step_record(1)
    metrics.close()


def test_steps_after_the_resumed_checkpoint_are_dropped_and_stand_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 8))
    write_steps(tmp_path, 4, range(5, 10))
    assert steps_in(tmp_path) == list(range(1, 10))


@pytest.mark.parametrize("torn", ['{"step": 4, "train/lo', '{"step": 4}\n\x00\x00\x00\n', "4\n", '{"loss": 1}\n'])
def test_what_a_kill_left_torn_is_dropped(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(torn)
    write_steps(tmp_path, 3, range(4, 6))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_whole_last_line_without_its_newline_is_not_joined_with_the_next(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, 3, range(4, 5))
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_kill_while_lines_are_dropped_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, 0, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def die(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics_file, "write_durably", die)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_shares_its_step_and_is_not_repeated_on_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 5))
    for _ in range(2):
        metrics = MetricsFile(tmp_path, 4)
        metrics.write(EVALUATION)
        metrics.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 4]


def test_events_stand_beside_the_figures_and_stay_when_their_steps_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, 0, 10, active=True)
    for step in range(1, 6):
        tracker.log_step(step_record(step), 1.0)
        if step in (2, 4):
            for reason in ("one", "two"):
                tracker.event({"step": step, "event": "skipped step", "reason": reason, "train/loss": math.nan})
    assert "step 4  SKIPPED STEP  reason two  train/loss nan\n" in capsys.readouterr().out
    tracker.rewind(3)
    tracker.event({"step": 3, "event": "went back", "from_step": 5})
    tracker.log_step(step_record(4), 1.0)
    tracker.close()
    path = tmp_path / "metrics.jsonl"
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    events = [(event["step"], event["event"]) for event in read_events(path)]
    assert events == [(step, "skipped step") for step in (2, 2, 4, 4)] + [(3, "went back")]


@pytest.mark.parametrize(
    ("value", "written"), [(math.nan, '"NaN"'), (math.inf, '"Infinity"'), (-math.inf, '"-Infinity"')]
)
def test_non_finite_losses_are_valid_json_and_read_back(tmp_path: Path, value: float, written: str) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(step_record(1, loss=value))
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert f'"train/loss": {written}' in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert repr(read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"]) == repr(value)


YAML = "seed: 1\nmodel:\n  layers: 2\n  vocab: null\nparallel:\n  sequence: false\n  partition: [1, 1]\n"


@pytest.fixture(autouse=True)
def no_forced_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the shell that runs the tests may say of its terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


def test_a_pipe_that_ends_on_a_terminal_gets_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = Console(0, 100, stream)
    console.header(YAML, [])
    console.step(step_record(7), time_left_s=65)
    console.close()
    assert "\x1b" in stream.getvalue() and "step 7/100" in stream.getvalue()


def test_a_log_gets_one_plain_line_a_step_and_no_ansi_codes() -> None:
    stream = io.StringIO()
    console = Console(0, 100, stream)
    console.header(YAML, [("parameters", "1.2M")])
    console.step(step_record(7), time_left_s=65)
    console.evaluation(EVALUATION)
    console.note("[red]kept as it is[/red]")
    console.close()
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[:2] == ["seed        1", "model       layers=2"]
    assert lines[2:4] == ["parallel    sequence=false partition=[1,1]", "parameters  1.2M"]
    assert lines[4] == (
        "step   7/100  loss 5.0000  lr 1.00e-03  |g| 0.700  640 tok/s  2.00 GFLOP/s  MFU 30.0%  256 MiB  left 1m05s"
    )
    assert lines[5] == "step 4  held-out loss 4.2000  perplexity 66.70  bits per byte 2.1000"
    assert lines[6] == "[red]kept as it is[/red]"
    assert len(lines) == 7


def test_a_terminal_gets_a_bar_with_the_same_figures() -> None:
    stream = io.StringIO()
    console = Console(0, 100, stream, terminal=True)
    console.header(YAML, [("parameters", "1.2M")])
    console.step(step_record(7), time_left_s=65)
    console.close()
    text = stream.getvalue()
    assert "\x1b" in text and "parameters" in text and "partition=[1,1]" in text
    assert "step 7/100" in text and "MFU 30.0%  256 MiB" in text and "left 1m05s" in text


def test_only_an_active_tracker_writes(tmp_path: Path) -> None:
    stream = io.StringIO()
    silent = Tracker(tmp_path, 0, 10, active=False, stream=stream)
    silent.header(YAML, [])
    silent.log_step(step_record(1), 0.0)
    silent.log_evaluation(EVALUATION)
    silent.note("no")
    silent.close()
    assert stream.getvalue() == "" and list(tmp_path.iterdir()) == []
    speaking = Tracker(tmp_path, 0, 10, active=True, stream=stream)
    speaking.log_step(step_record(1), 0.0)
    speaking.log_evaluation(EVALUATION)
    speaking.close()
    assert len(stream.getvalue().splitlines()) == len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_sizes_times_and_counts_are_short() -> None:
    assert [format_time(value) for value in (0.4, 59, 60, 3725)] == ["0s", "59s", "1m00s", "1h02m"]
    assert format_time(90000) == "1d01h"
    assert [format_bytes(value) for value in (2**20, 3 * 2**29)] == ["1 MiB", "1.50 GiB"]
    assert [format_count(value) for value in (12, 1234, 124_439_808, 8e9)] == ["12", "1.23k", "124M", "8B"]


class Full(io.FileIO):
    """A file on a disk that has room for some bytes more, and for the rest of its lines once it has been emptied."""

    room = 0

    def write(self, data: Any) -> int:
        if type(self).room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = super().write(data[: type(self).room])
        type(self).room -= count
        return count


def test_lines_that_a_full_disk_refuses_wait_and_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(io, "FileIO", Full)
    Full.room = 150
    metrics = MetricsFile(tmp_path, 0)
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 8):
        assert metrics.write(step_record(step))
    assert 0 < path.stat().st_size <= 150, "the last line that is there may be torn"
    Full.room = 1 << 20
    metrics.write({"step": 7, "event": "SAVE FAILED", "reason": "the disk is full"})
    assert steps_in(tmp_path) == list(range(1, 8)) and len(read_events(path)) == 1
    assert [message.split(": ", 1)[1][:30] for message in caplog.messages] == [
        "cannot write: No space left on", "the disk takes lines again, th"
    ]  # fmt: skip
    Full.room = 0
    metrics.write(step_record(8))
    metrics.write(step_record(9))
    monkeypatch.setattr(metrics_file, "_WAITING_BYTES", 500)
    metrics.write(step_record(10))
    metrics.close()
    assert "3 lines of metrics are lost" in caplog.messages[-1] and steps_in(tmp_path) == list(range(1, 8))


@pytest.mark.parametrize("rewind", [False, True])
def test_later_lines_are_dropped_where_a_disk_has_no_room_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewind: bool
) -> None:
    write_steps(tmp_path, 0, range(1, 8))

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics_file, "write_durably", full)
    metrics = MetricsFile(tmp_path, 9 if rewind else 4)
    if rewind:
        metrics.rewind(4)
    metrics.write(step_record(5, loss=1.0))
    metrics.close()
    assert [record["train/loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [5.0] * 4 + [1.0]


def test_a_disk_that_takes_nothing_at_all_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{tmp_path}/gone/metrics.jsonl: cannot be written: No such file"):
        MetricsFile(tmp_path / "gone", 0)
