"""Runs of two ranks, the disk of one of which fails while a checkpoint is written beside training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.commands import verify
from megalm.checkpoint.names import find_checkpoints, step_of
from megalm.errors import HUNG
from megalm.launch.local import run_workers
from megalm.train.metrics_file import read_events, read_metrics
from tests.end_to_end.workplace import ROOT, make_workplace

STEPS = 12


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def train(place: Path, *fault: Any, more: tuple[str, ...] = ()) -> int:
    settings = ("recipe.yaml", f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9", "parallel.tensor=2")
    command = [sys.executable, "-m", "tests.train.faulty_disk", *map(str, fault), *settings, *more]
    return run_workers(command, 2, place / "logs")


def saved(place: Path) -> list[int]:
    assert len(verify(place / "run")["checkpoints"]) == len(find_checkpoints(place / "run/checkpoints"))
    return sorted(map(step_of, find_checkpoints(place / "run/checkpoints")))


def test_training_goes_on_while_a_disk_is_full_and_is_saved_when_it_is_not(place: Path) -> None:
    assert train(place, "ENOSPC", 1, 4, 8) == 0
    assert saved(place) == [2, 10, 12]
    events = read_events(place / "run/metrics.jsonl")
    assert [(event["step"], event["event"], event["failures in a row"]) for event in events] == [
        (4, "SAVE FAILED", 1), (6, "SAVE FAILED", 2), (8, "SAVE FAILED", 3)
    ]  # fmt: skip
    for said in ("rank 1: ", "step-00000004.partial/rank-00001-weight.safetensors", "No space left on device"):
        assert said in events[0]["reason"]
    log = (place / "logs/rank-0.log").read_text()
    assert "SAVE FAILED" in log and log.count("trying again in") == 9
    records = [line for line in read_metrics(place / "run/metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in records] == list(range(1, STEPS + 1))
    told = [line for line in records if "checkpoint/stall_s" in line]
    assert len(told) >= 5 and all(line["checkpoint/stall_s"] >= 0 for line in told)


def test_too_many_failures_end_the_run_on_all_ranks_with_path_and_cause(place: Path) -> None:
    assert train(place, "EIO", 1, 4, 99, more=("checkpoint.failures=1",)) == 1
    assert saved(place) == [2]
    records = [line for line in read_metrics(place / "run/metrics.jsonl") if "train/loss" in line]
    assert records[-1]["step"] == 6, "the save of step 4 is borne, that of step 6 is waited for"
    said = "step-00000006.partial/rank-00001-weight.safetensors: cannot save the checkpoint: Input/output error"
    for rank in range(2):
        assert said in (place / f"logs/rank-{rank}.log").read_text()
    assert train(place, "EIO", 1, 99, 99) == 0, "and goes on when the disk is well"
    assert saved(place) == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_a_disk_that_hangs_for_ever_is_named_and_ends_the_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(place, "hang", 1, 4, 99, more=("run.hang_timeout_s=10",)) == HUNG
    assert "at step 6 in after the step (background.py:" in capfd.readouterr().err
    assert saved(place) == [2]
