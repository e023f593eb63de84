"""A scaling run on this machine: real training of one and two processes, and points that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megalm.bench import here
from megalm.bench.plan import Point, point_directory, read_plan
from megalm.cli import main
from megalm.train.metrics_file import read_metrics
from tests.bench.points import write_steps
from tests.end_to_end.workplace import make_workplace, megalm

COMMAND = ("bench", "scaling", "recipe.yaml", "run.device=cpu", "--nproc", "2,1", "--out", "sc")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_workplace(tmp_path / "place")


@pytest.mark.slow
def test_one_and_two_processes_train_and_are_drawn(place: Path) -> None:
    done = megalm(place, *COMMAND, "--weak", "--steps=6", "--json")
    assert done.returncode == 0, done.stderr
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        "point 1 of 2: 1 rank, 6 steps",
        "point 2 of 2: 2 ranks, 6 steps",
    ]
    result = json.loads(done.stdout)
    assert result == json.loads((place / "sc/scaling.json").read_text())
    assert [(point["ranks"], point["global_batch"]) for point in result["points"]] == [(1, 4), (2, 8)]
    for point in result["points"]:
        assert point["state"] == "measured" and point["measured_steps"] == 4
        assert point["tokens_low_per_s"] <= point["tokens_per_s"] <= point["tokens_high_per_s"]
        run = Path(point["run"])
        steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert json.loads((run / "run.json").read_text())["world"] == point["ranks"]
        assert not (run / "checkpoints").exists()
        assert (run / "logs/train.log").stat().st_size > 0
    assert result["points"][0]["efficiency"] == 1.0 and result["machines"][0]["cores"] >= 1
    assert "# Weak scaling of recipe.yaml" in (place / "sc/scaling.md").read_text()
    assert (place / "sc/scaling.png").stat().st_size > 10_000
    again = megalm(place, *COMMAND, "--steps=6")
    assert again.returncode == 2 and "--fresh to remove it" in again.stderr
    assert read_plan(place / "sc").mode == "weak"


def test_a_point_that_fails_does_not_keep_the_others_from_running(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)

    def command(out: Path, point: Point) -> list[str]:
        if point.ranks == 1:
            return [sys.executable, "-c", "import sys; sys.exit('MemoryError: planted')"]
        write_steps(out, point, [0.5] * 6)
        return [sys.executable, "-c", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"]

    monkeypatch.setattr(here, "train_command", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main([*COMMAND, "--steps=6"]) == 1
    told = capsys.readouterr()
    assert "error: without figures, 1 of 2 points: 1 rank: 0 of 6 steps: MemoryError: planted" in told.err
    assert [point.status for point in read_plan(place / "sc").points] == [1, 0]
    result = json.loads((place / "sc/scaling.json").read_text())
    assert (result["baseline_ranks"], result["points"][1]["tokens_per_s"]) == (2, 4 * 16 / 0.5)
    logs = point_directory(place / "sc", Point(2, 0)) / "logs"
    assert (logs / "train.log").read_text() == "threads 1\n"
    assert json.loads((logs / "machine.json").read_text())["threads_a_rank"] == 1
