"""Profiled windows: which ranks write which steps, what the traces name, and that the run computes the same."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.config.run import ProfileSection
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import Progress, progress
from megalm.train.metrics_file import read_metrics
from megalm.train.profiling import Profile
from tests.end_to_end.workplace import make_workplace, megalm
from tests.train.test_callbacks import Notes, trainer_of
from tests.worker_pool import WorkerPool


def ranges(path: Path) -> Counter[str]:
    """Return how often each range that the program names stands in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def losses(run: Path) -> list[float]:
    records = read_metrics(run / "metrics.jsonl")
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.slow
def test_chosen_ranks_write_named_ranges_and_the_losses_are_the_same(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    command = ("train", "recipe.yaml", "train.steps=5", "parallel.pipeline=2", "train.micro_batch=1")
    profiled = ("run.dir=seen", "profile.start=2", "profile.steps=2", "profile.ranks=[1]", "profile.memory=true")
    for arguments in (["run.dir=unseen"], profiled):
        done = megalm(place, *command, *arguments)
        assert done.returncode == 0, done.stderr
    assert not (place / "unseen" / "profile").exists()
    (trace,) = (place / "seen" / "profile").iterdir()
    assert trace.name == "steps-2-3.rank-1.json.gz"
    found = ranges(trace)
    for name in ("data", "forward and backward", "gradient reduction", "update"):
        assert found[name] == 2, found
    for microbatch in range(4):
        assert found[f"forward {microbatch}"] == found[f"backward {microbatch}"] == 2, found
    assert found["communication irecv"] == found["communication isend"] == 8, "both ways, of 2 steps' 4 microbatches"
    assert "forward 4" not in found and found["communication all_reduce"] >= 2
    assert losses(place / "seen") == losses(place / "unseen") and len(losses(place / "seen")) == 5


def profiled_steps(mesh: ParallelMesh, run: Path, resumed_at: int, more: int, **section: Any) -> list[str]:
    """Return the files that a run leaves which goes on at a step and ends after some, and what it says of them."""
    notes, trainer = Notes(), trainer_of(mesh, resumed_at + more)
    trainer.state.step = resumed_at
    profile = Profile(run, ProfileSection(**section), mesh, notes, notes)  # type: ignore[arg-type]
    trainer.before_step.append(profile.before_step)
    trainer.fit([profile])
    assert progress.observer is None
    files = sorted(path.name for path in run.glob("profile/*"))
    assert notes.notes == [f"profile {run / 'profile' / name}" for name in files]
    return files


def check_windows(mesh: ParallelMesh, place: Path) -> None:
    for number, (resumed_at, more, section, expected) in enumerate([
        (0, 5, {"start": 1, "steps": 2}, ["steps-1-2.rank-0.json.gz"]),
        (0, 4, {"start": 3, "steps": 2}, ["steps-3-4.rank-0.json.gz"]),
        (3, 3, {"start": 2, "steps": 4}, ["steps-4-5.rank-0.json.gz"]),
        (0, 3, {"start": 2, "steps": 9, "ranks": None}, ["steps-2-3.rank-0.json.gz"]),
        (5, 2, {"start": 2, "steps": 2}, []),
        (0, 3, {"start": 1, "ranks": (1,)}, []),
        (0, 3, {}, []),
    ]):  # fmt: skip
        run = place / str(number)
        run.mkdir()
        assert profiled_steps(mesh, run, resumed_at, more, **section) == expected
        for name in expected:
            first, last = map(int, name.split(".")[0].split("-")[1:])
            assert ranges(run / "profile" / name)["update"] == last - first + 1


def test_a_window_begins_where_the_run_does_and_ends_with_it(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_windows, tmp_path, layout=RankLayout())


def check_full_disk(mesh: ParallelMesh, run: Path) -> None:
    (run / "profile").write_text("not a directory")
    notes, trainer = Notes(), trainer_of(mesh, 3)
    profile = Profile(run, ProfileSection(start=1, steps=1), mesh, notes, notes)  # type: ignore[arg-type]
    trainer.before_step.append(profile.before_step)
    trainer.fit([profile])
    assert trainer.state.step == 3 and notes.notes == []


def test_a_trace_that_cannot_be_written_does_not_end_the_run(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_full_disk, tmp_path, layout=RankLayout())


def test_nobody_who_looks_costs_one_question() -> None:
    quiet = Progress()
    assert quiet.doing("forward", 1) is quiet.doing("backward", 2)
    seen: list[Any] = []
    quiet.observer = SimpleNamespace(phase=seen.append, work=lambda kind, what: (kind, what))  # type: ignore[assignment]
    quiet.enter(1, "update")
    assert seen == ["update"] and quiet.doing("forward", 1) == ("forward", 1)
