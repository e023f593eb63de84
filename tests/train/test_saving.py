"""When a run is saved, what it says of itself there, and what becomes of it when saves fail."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalm.checkpoint import background, snapshot
from megalm.checkpoint.manager import CheckpointManager, latest_checkpoint
from megalm.checkpoint.names import find_checkpoints, step_of
from megalm.checkpoint.retention import Keep
from megalm.config.run import CheckpointSection
from megalm.distributed.host_memory import free_host_bytes
from megalm.distributed.layout import RankLayout
from megalm.distributed.meeting import Meeting
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError, CorruptionError, OutOfMemory, StorageError
from megalm.train.replicas import CompareReplicas
from megalm.train.saving import SaveCheckpoints
from megalm.train.trainer import StepResult, StepTimes, Trainer, TrainState
from tests.checkpoint.simulated import HastyFileSystem
from tests.parity.harness import Case, build_trainer
from tests.worker_pool import WorkerPool

SPEC = ShardSpec.whole("x", (4,))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_LOOK_S", 0.02)
    monkeypatch.setattr(background.try_to_save, "__defaults__", ((0.01,), True))


class Disk(HastyFileSystem):
    """Refuses to create files while `full`, and waits before each write while it is shut."""

    def __init__(self) -> None:
        self.full, self.open = False, threading.Event()
        self.open.set()

    def create(self, path: Path) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().create(path)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        assert self.open.wait(60)
        super().write(descriptor, data)


class Notes:
    """Stands for tracker and meter, and keeps what they are told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.notes: list[str] = []
        self.clock_runs = True

    def event(self, record: Any) -> None:
        self.events.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.clock_runs = False
        yield
        self.clock_runs = True


class Run:
    """A run of which nothing is real but its checkpoints: `train` does steps, each of which changes the weights."""

    def __init__(self, directory: Path, disk: Disk, steps: int = 100, **section: Any) -> None:
        self.disk, self.notes = disk, Notes()
        self.section = CheckpointSection(**{"every": 2, "keep": 3, **section})
        keep = Keep(self.section.keep, self.section.keep_every, self.section.keep_best)
        self.manager = CheckpointManager(directory, keep, files=disk)
        self.weights = torch.zeros(4)
        self.state = TrainState()
        engine = SimpleNamespace(state=lambda: iter([Fragment(SPEC, "weight", 0, self.weights)]))
        self.trainer: Any = SimpleNamespace(state=self.state, last_step=steps, engine=engine)
        self.log = SimpleNamespace(record={})
        self.evaluate = SimpleNamespace(record={"step": -1})
        notes: Any = self.notes
        facts, nothing = {"data_fingerprint": "f"}, CompareReplicas(0)
        more: Any = (self.log, self.evaluate)
        self.save = SaveCheckpoints(notes, notes, self.manager, facts, nothing, self.section, *more)

    def step(self) -> None:
        self.save.before_update(self.trainer)
        self.state.step += 1
        self.weights += 1.0
        loss = 10.0 / self.state.step
        self.log.record = {"step": self.state.step, "train/loss": loss, "time/step_s": 0.1}
        self.save.after_step(self.trainer, StepResult(loss, 1.0, 0.1, None, StepTimes(0, 0, 0), None))

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.step()
        return self

    def settle(self) -> None:
        """Return when the save that is on its way has ended, as a thread that nobody waits for."""
        while self.manager._flight is not None and self.manager.ended() is None:
            time.sleep(0.005)

    def saved(self) -> list[int]:
        """Return the steps of the checkpoints; each must hold its step's weights."""
        found = find_checkpoints(self.manager.directory)
        for path in found:
            reader = latest_checkpoint(self.manager.run_dir, before=[step_of(path) + 1])
            assert reader is not None
            with closing(reader):
                assert reader.read_local(SPEC, "weight").eq(reader.step).all() and reader.step == step_of(path)
                assert reader.state["progress"]["step"] == reader.step
        return sorted(map(step_of, found))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("steps", "section", "expected"),
    [
        (3, {"every": 0}, [3]),
        (5, {}, [2, 4, 5]),
        (4, {}, [2, 4]),
        (3, {"every": 0, "at_end": False}, []),
        (3, {"at_end": False}, [2]),
        (4, {"at_end": False}, [2, 4]),
        (7, {"keep": 1, "keep_every": 4}, [4, 7]),
    ],
)
def test_a_run_is_saved_every_nth_step_and_once_at_the_end(
    tmp_path: Path, asynchronous: bool, steps: int, section: dict[str, Any], expected: list[int]
) -> None:
    run = Run(tmp_path, Disk(), steps, asynchronous=asynchronous, **section).train(steps)
    run.save.at_end(run.trainer)
    assert run.saved() == expected
    assert run.notes.notes[-1:] == [f"checkpoint {run.manager.directory}/step-{step:08d}" for step in expected[-1:]]
    assert run.notes.events == [] and run.notes.clock_runs


def test_a_run_that_is_resumed_at_its_end_is_not_saved_again(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(), 4).train(4)
    run.save.at_end(run.trainer)
    again = Run(tmp_path, run.disk, 4)
    reader = again.manager.latest()
    assert reader is not None
    again.state.step = 4
    again.save.resumed(reader)
    again.save.at_end(again.trainer)
    assert again.notes.notes == [] and again.saved() == [2, 4]


def test_training_goes_on_during_a_save_and_an_interruption_saves_what_is_later(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk())
    run.disk.open.clear()
    run.train(3)
    assert run.saved() == [] and run.notes.notes == []
    threading.Timer(0.1, run.disk.open.set).start()
    run.save.at_end(run.trainer)  # as after SIGTERM at step 3 of 100
    assert run.saved() == [2, 3]
    assert [note[-8:] for note in run.notes.notes if note.startswith("checkpoint ")] == ["00000002", "00000003"]


def test_one_save_at_a_time_and_what_it_took_is_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.train.saving._TELL_WAIT_S", 0.05)
    run = Run(tmp_path, Disk())
    run.disk.open.clear()
    run.train(2)
    first = run.save.figures()
    assert first.keys() == {"checkpoint/stall_s"} and first["checkpoint/stall_s"] < 0.2
    assert run.save.figures() == {}
    threading.Timer(0.3, run.disk.open.set).start()
    run.train(2)
    second = run.save.figures()
    assert second.keys() == {"checkpoint/stall_s", "checkpoint/write_s", "checkpoint/bytes"}
    assert second["checkpoint/stall_s"] > 0.1 and second["checkpoint/write_s"] > 0.25
    assert (
        second["checkpoint/bytes"]
        == (run.manager.directory / "step-00000002/rank-00000-weight.safetensors").stat().st_size
    )
    assert "the checkpoint of step 2 was waited for 0." in run.notes.notes[0] and run.notes.events == []
    run.settle()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failed_saves_are_told_and_borne_until_they_are_too_many(tmp_path: Path, asynchronous: bool) -> None:
    run = Run(tmp_path, Disk(), asynchronous=asynchronous, failures=2).train(2)
    run.settle()
    run.disk.full = True
    run.train(3)
    run.settle()
    run.train(1)
    run.settle()
    run.train(1)  # step 7: a look at the save of step 6
    told = [(event["step"], event["event"], event["failures in a row"]) for event in run.notes.events]
    assert told == [(4, "SAVE FAILED", 1), (6, "SAVE FAILED", 2)]
    for said in ("No space left on device", str(run.manager.directory), "earlier ones are kept"):
        assert said in run.notes.events[0]["reason"]
    assert run.notes.events[0]["newest is of step"] == "2" and run.saved() == [2]
    with pytest.raises(StorageError, match="No space left"):
        run.train(1)  # the third: this one is waited for
    assert run.state.step == 8 and run.saved() == [2]


def test_a_save_that_succeeds_makes_the_count_begin_anew(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(), failures=1)
    for _ in range(3):
        run.disk.full = True
        run.train(2)
        run.settle()
        run.disk.full = False
        run.train(2)  # waited for, as its failure would end the run
        assert run.save.saved_step == run.state.step
    assert [event["failures in a row"] for event in run.notes.events] == [1, 1, 1] and run.saved() == [4, 8, 12]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_without_tolerance_the_first_failure_ends_the_run_at_its_step(tmp_path: Path, asynchronous: bool) -> None:
    run = Run(tmp_path, Disk(), asynchronous=asynchronous, failures=0)
    run.disk.full = True
    with pytest.raises(StorageError, match="No space left"):
        run.train(2)
    assert run.state.step == 2


@pytest.mark.parametrize("at_end", [False, True])
def test_a_run_whose_newest_save_failed_does_not_end_well(tmp_path: Path, at_end: bool) -> None:
    run = Run(tmp_path, Disk(), steps=5, failures=9, at_end=at_end)
    run.train(3)
    run.settle()
    run.disk.full = True
    run.train(2)
    with pytest.raises(StorageError, match="No space left"):
        run.save.at_end(run.trainer)
    assert run.saved() == [2] and run.notes.events[-1]["event"] == "SAVE FAILED"


def test_a_save_that_failed_does_not_hinder_an_end_that_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(), steps=5, failures=9)
    run.disk.full = True
    run.train(5)
    run.settle()
    run.disk.full = False
    run.save.at_end(run.trainer)
    assert run.saved() == [5]


def test_a_run_that_goes_back_does_not_believe_in_a_save_that_was_on_its_way(tmp_path: Path) -> None:
    """Its checkpoint is deleted, and its step will be done once more: were it the last one, it would not be saved."""
    run = Run(tmp_path, Disk(), steps=4)
    run.disk.open.clear()
    run.train(2)
    threading.Timer(0.1, run.disk.open.set).start()
    earlier: Any = SimpleNamespace(state={}, step=0)
    run.save.went_back(earlier)
    assert run.save.saved_step == -1 and run.manager.wait() is None


def test_a_fault_that_is_none_of_storage_is_not_borne(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(), failures=9)
    run.train(1)
    run.weights = torch.zeros(3)  # do not tile the tensor
    run.train(1)
    run.settle()
    run.train(1)
    with pytest.raises(CheckpointError, match="elements 3 to 4 are missing"):
        run.train(1)


def test_where_there_is_no_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_ASKED_BYTES", 0)
    monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 5 << 20)
    run = Run(tmp_path, Disk()).train(2)
    assert run.saved() == [2] and run.manager._flight is None
    (event,) = run.notes.events
    assert event["event"] == "training waits for saves from now on" and "5 MiB are free" in event["reason"]
    monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 1 << 40)
    assert run.train(3).saved() == [2, 4] and run.notes.events == [event], "it stays so"


def saves_where_rank_1_lacks_memory(mesh: ParallelMesh, run: str) -> str:
    """Return what a save beside training says on this rank, where one rank's host is full."""
    snapshot._ASKED_BYTES, snapshot.free_host_bytes = 0, lambda: 0 if mesh.rank == 1 else 1 << 40
    try:
        manager = CheckpointManager(Path(run), 1, world_group(), meeting=Meeting.of_world("no memory"))
        fragments = [Fragment(SPEC, "weight", mesh.rank, torch.ones(1))]
        with pytest.raises(OutOfMemory) as caught:
            manager.begin(1, fragments, {})
        assert manager.ended() is None
        assert manager.save_patiently(1, lambda: fragments, {}).error is None
        return str(caught.value)
    finally:
        snapshot._ASKED_BYTES, snapshot.free_host_bytes = 1 << 20, free_host_bytes


def test_all_ranks_wait_where_one_has_no_memory(pool: WorkerPool, tmp_path: Path) -> None:
    said = pool.run(saves_where_rank_1_lacks_memory, str(tmp_path), layout=RankLayout(data=4))
    assert len({*said}) == 1 and said[0].startswith("rank 1: the host's memory has no room")
    assert [step_of(path) for path in find_checkpoints(tmp_path / "checkpoints")] == [1]


def test_nothing_is_saved_of_replicas_that_differ(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk())

    def differ(trainer: Any) -> None:
        raise CorruptionError("replicas differ")

    run.save.replicas.ensure_equal = differ  # type: ignore[method-assign]
    with pytest.raises(CorruptionError):
        run.train(2)
    assert run.saved() == []


def test_the_state_tells_what_the_run_was_like_and_the_metric_by_which_it_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(), steps=8, keep=1, keep_best="evaluate/loss")
    for loss in (2.0, 1.0, 3.0):
        run.step()
        run.evaluate.record = {"step": run.state.step + 1, "evaluate/loss": loss}
        run.step()
    run.step()  # the save of step 6 is seen, which deletes
    run.settle()
    run.save.at_end(run.trainer)
    assert run.saved() == [4, 7]
    states = [json.loads((run.manager.directory / f"step-0000000{n}/state.json").read_text()) for n in (4, 7)]
    assert states[0]["metric"] == {"name": "evaluate/loss", "value": 1.0, "step": 4}
    assert "metric" not in states[1], "not evaluated there"
    assert states[1]["metrics"] == {
        "train": {"step": 7, "train/loss": 10.0 / 7},
        "evaluate": {"step": 6, "evaluate/loss": 3.0},
        "best": {"step": 4, "evaluate/loss": 1.0},
    }
    again = Run(tmp_path, run.disk, steps=20, keep=1, keep_best="evaluate/loss")
    reader = again.manager.latest()
    assert reader is not None
    again.save.resumed(reader)
    again.state.step, again.weights[:] = 7, 7.0
    again.train(2)
    again.settle()
    assert again.saved() == [4, 8], "the best is known after a resume"
    state = json.loads((run.manager.directory / "step-00000008/state.json").read_text())
    assert state["metrics"]["best"]["step"] == 4
    again.save.went_back(reader)
    assert again.save.saved_step == -1 and again.save.history["train"]["step"] == 7


def real_saves(mesh: ParallelMesh, run: str) -> list[int]:
    """Save real trainers, whose step after a save changes every tensor at once; return the steps of the checkpoints."""
    small = {
        "model.layers": 1,
        "model.hidden": 8,
        "model.heads": 2,
        "model.sequence": 8,
        "train.steps": 3,
        "lr_schedule.warmup_steps": 2,
    }
    trainer: Trainer = build_trainer(mesh, Case(1, 1, 1, {**small}).config())
    notes: Any = Notes()
    disk = Disk()
    manager = CheckpointManager(Path(run), 2, files=disk)
    save = SaveCheckpoints(notes, notes, manager, {}, CompareReplicas(0), CheckpointSection(every=2))
    disk.open.clear()
    trainer.before_update = [save.before_update]
    kept: dict[int, dict[tuple[str, str, int], torch.Tensor]] = {}

    class Keeper:
        def after_step(self, trainer: Trainer, result: StepResult) -> None:
            kept[trainer.state.step] = {
                (f.shard.name, f.kind, f.start): f.values.clone() for f in trainer.engine.state()
            }
            if trainer.state.step == 3:
                disk.open.set()

        def at_end(self, trainer: Trainer) -> None: ...

    trainer.fit([Keeper(), save])
    for path in find_checkpoints(manager.directory):
        reader = latest_checkpoint(Path(run), before=[step_of(path) + 1])
        assert reader is not None and reader.step == step_of(path)
        assert reader.state["progress"]["planned"] == reader.state["progress"]["samples"] == 8 * reader.step
        for fragment in trainer.engine.state():
            key = fragment.shard.name, fragment.kind, fragment.start
            found = reader.read_flat(fragment.shard, fragment.kind, 0, fragment.values.numel())
            assert torch.equal(found, kept[reader.step][key]), key
    assert not torch.equal(*(next(iter(kept[step].values())) for step in (2, 3)))
    return sorted(map(step_of, find_checkpoints(manager.directory)))


def test_what_is_saved_beside_an_update_is_what_was_before_it(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(real_saves, str(tmp_path), layout=RankLayout()) == [[2, 3]]
