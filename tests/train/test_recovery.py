"""Runs whose data or arithmetic goes bad: batches are skipped, the run goes back, or it stops and says why."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.checkpoint.manager import CheckpointManager
from megalm.errors import Diverged
from megalm.launch.local import run_workers
from megalm.train.metrics_file import read_events, read_metrics
from megalm.train.recovery import GoBack, tell_of_damaged
from megalm.train.trainer import TrainState
from tests.end_to_end.workplace import environment, make_workplace

SETTINGS = ("stability.spike_window=8", "checkpoint.every=10", "evaluate.every=0")
POISONED = ("labels", 92, 104)  # of the steps 24, 25 and 26


def train(place: Path, poison: tuple[Any, ...], run: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.train.poisoned", *map(str, poison), "recipe.yaml", f"run.dir={run}"]
    return subprocess.run(
        [*command, *SETTINGS, *overrides], cwd=place, env=environment(), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("recovery") / "place")


@pytest.fixture(scope="module")
def poisoned(place: Path) -> Path:
    done = train(place, POISONED, "whole")
    assert done.returncode == 0, done.stderr
    return place / "whole"


def test_three_spikes_send_the_run_back_and_past_their_data(poisoned: Path) -> None:
    events = read_events(poisoned / "metrics.jsonl")
    skipped = [(step, "skipped step") for step in (24, 25, 26)]
    assert [(event["step"], event["event"]) for event in events] == [*skipped, (20, "went back")]
    assert "standard deviations above the mean" in events[0]["reason"]
    assert events[-1]["from_step"] == 26 and events[-1]["next_sample"] == 104
    records = [record for record in read_metrics(poisoned / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in records] == list(range(1, 41)), "every step stands there once"
    assert [record["tokens"] for record in records[19:22]] == [20 * 64, 27 * 64, 28 * 64]
    assert all(math.isfinite(record["optim/grad_norm"]) for record in records)


def test_a_run_that_went_back_resumes_bit_for_bit(place: Path, poisoned: Path) -> None:
    """From a later checkpoint, and from the one that was saved again when the run went back, as after a crash."""
    for stop in (27, 31, 40):
        done = train(place, POISONED, "parts", f"train.stop_at={stop}")
        assert done.returncode == 0, done.stderr
        if stop == 27:
            shutil.rmtree(place / "parts" / "checkpoints" / "step-00000027")
    losses = [
        [record["train/loss"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
        for run in (poisoned, place / "parts")
    ]
    assert losses[0] == losses[1]


def test_a_run_that_goes_back_takes_the_batch_of_its_step_from_where_the_data_is(place: Path) -> None:
    done = train(place, ("labels", 52, 64), "grown", "batch_ramp.start=2", "batch_ramp.every=24")
    assert done.returncode == 0, done.stderr
    back = read_events(place / "grown" / "metrics.jsonl")[-1]
    assert (back["event"], back["step"], back["from_step"], back["next_sample"]) == ("went back", 20, 28, 64)
    records = [record for record in read_metrics(place / "grown" / "metrics.jsonl") if "train/loss" in record]
    assert [record["train/global_batch"] for record in records] == [2] * 24 + [4] * 16
    assert [record["tokens"] // 16 for record in records[19:26]] == [40, 66, 68, 70, 72, 76, 80]


def test_a_few_skipped_steps_are_events_and_the_run_goes_on(place: Path) -> None:
    """Two steps of one rank's NaN: no rank updates, under two data ranks and ZeRO 1 too."""
    for run, nproc, overrides in (("few", 1, []), ("few-2", 2, ["zero.stage=1"])):
        command = [sys.executable, "-m", "tests.train.poisoned", "nan", "24", "26", "recipe.yaml", f"run.dir={run}"]
        if nproc == 1:
            done = train(place, ("nan", 24, 26), run, *overrides)
            assert done.returncode == 0, done.stderr
            assert "step 24  SKIPPED STEP  reason the gradient norm is nan" in done.stdout
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
                assert run_workers([*command, *SETTINGS, *overrides], nproc, place / "logs") == 0
        events = read_events(place / run / "metrics.jsonl")
        assert [(event["step"], event["event"]) for event in events] == [(24, "skipped step"), (25, "skipped step")]
        records = [record for record in read_metrics(place / run / "metrics.jsonl") if "train/loss" in record]
        assert [record["step"] for record in records if math.isnan(record["optim/grad_norm"])] == [24, 25]
        assert len(records) == 40


def test_a_damaged_checkpoint_before_the_trouble_is_told_and_a_later_one_taken(place: Path, poisoned: Path) -> None:
    run = place / "half"
    shutil.copytree(poisoned, run)
    (run / "checkpoints" / "step-00000030" / "manifest.json").write_bytes(b"")
    told: list[dict[str, Any]] = []
    manager, tracker = CheckpointManager(run, 2), SimpleNamespace(event=told.append)
    recovery = GoBack(tracker, None, manager, None, None)  # type: ignore[arg-type]
    reader = recovery._checkpoint(TrainState(step=42, skipped_steps=[37, 41, 42]))
    assert reader is not None and reader.step == 40
    tell_of_damaged(recovery.tracker, manager, reader.step)
    assert [event["event"] for event in told] == ["DAMAGED CHECKPOINT PASSED OVER"] and "00000030" in told[0]["reason"]


def test_a_run_without_a_way_back_stops_and_says_why(place: Path) -> None:
    early = train(place, ("nan", 2, 100), "early")
    assert early.returncode == Diverged.exit_status
    text = "error: step 4: the gradient norm is nan; 3 of the last 10 steps made no update and there is no checkpoint"
    assert text in early.stderr
    often = train(place, ("nan", 22, 100), "often", "stability.rollbacks=2")
    assert often.returncode == Diverged.exit_status
    assert "the run went back 2 times before; lower optim.lr" in often.stderr
    events = read_events(place / "often" / "metrics.jsonl")
    went_back = [event["step"] for event in events if event["event"] == "went back"]
    assert went_back == [20, 10], "the second time to an earlier one"
    assert len(events) == 3 * 3 + 2
