"""Saves beside training: what is written, which faults of storage are borne, slow disks and such as hang."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import background
from megalm.checkpoint.commands import verify
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.manager import CheckpointManager, latest_checkpoint
from megalm.distributed.progress import progress
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError, StorageError
from tests.checkpoint.disk_model import RecordingFileSystem

SPEC = ShardSpec.whole("x.weight", (4, 8))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_LOOK_S", 0.05)
    monkeypatch.setattr(background.try_to_save, "__defaults__", ((0.01, 0.01, 0.01), True))


class Disk(FileSystem):
    """Waits at each write while it is shut; refuses to create files while it has an error left to give."""

    def __init__(self) -> None:
        self.open, self.waits = threading.Event(), threading.Event()
        self.open.set()
        self.code, self.left, self.pause_s = 0, 0, 0.0

    def create(self, path: Path) -> int:
        if self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code), str(path))
        return super().create(path)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        time.sleep(self.pause_s)
        if not self.open.is_set():
            self.waits.set()
            assert self.open.wait(60)
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Return at once."""

    def sync_directory(self, path: Path) -> None:
        """Return at once."""


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.open.set()


def fragments(mark: float) -> Iterator[Fragment]:
    for kind in ("weight", "exp_avg"):
        yield Fragment(SPEC, kind, 0, torch.full((32,), mark))


def mark_of(run: Path) -> float | None:
    reader = latest_checkpoint(run)
    if reader is None:
        return None
    mark = float(reader.state["mark"])
    assert all(reader.read_local(SPEC, kind).eq(mark).all() for kind in ("weight", "exp_avg"))
    return mark


def save(manager: CheckpointManager, step: int, mark: float) -> background.Saved:
    manager.begin(step, fragments(mark), {"mark": mark})
    saved = manager.wait()
    manager.taken()
    assert saved is not None and saved.step == step
    return saved


def test_training_goes_on_and_what_is_written_is_what_was(tmp_path: Path, disk: Disk) -> None:
    manager = CheckpointManager(tmp_path, 1, files=disk)
    save(manager, 1, 1.0)
    disk.open.clear()
    values, state = torch.full((32,), 2.0), {"mark": 2.0, "list": [1]}
    manager.begin(2, [Fragment(SPEC, kind, 0, values) for kind in ("weight", "exp_avg")], state)
    assert disk.waits.wait(60) and manager.ended() is None
    values.zero_()
    state["mark"] = 7.0
    state["list"].append(2)  # type: ignore[attr-defined]
    assert mark_of(tmp_path) == 1.0, "who reads meanwhile finds the one before, and no half one"
    verify(tmp_path)
    with pytest.raises(AssertionError, match="has not been waited for"):
        manager.begin(3, fragments(3.0), {"mark": 3.0})
    threading.Timer(0.2, disk.open.set).start()
    latest = manager.latest()  # waits, as a run that goes back must
    assert latest is not None and (latest.step, latest.state) == (2, {"mark": 2.0, "list": [1]})
    assert mark_of(tmp_path) == 2.0
    saved = manager.ended()
    assert saved is not None and saved.error is None and saved.bytes > 256 and saved.write_s >= 0.2
    assert saved is manager.wait()
    manager.taken()
    assert manager.wait() is None
    assert [path.name for path in manager.directory.iterdir()] == ["step-00000002"], "deleted in the thread"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_fault_that_passes_is_tried_again_and_one_that_stays_is_told(
    tmp_path: Path, disk: Disk, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path, 2, files=disk)
    disk.code, disk.left = code, 2
    assert save(manager, 1, 1.0).error is None
    assert len(caplog.messages) == 2 and all("trying again in 0.01 s" in message for message in caplog.messages)
    disk.left = 1000
    saved = save(manager, 2, 2.0)
    assert disk.left == 996, "four tries"
    assert isinstance(saved.error, StorageError) and str(saved.path).endswith("step-00000002")
    for said in (os.strerror(code), str(manager.directory / ".step-00000002.partial"), "earlier ones are kept"):
        assert said in str(saved.error)
    assert mark_of(tmp_path) == 1.0 and [path.name for path in manager.directory.iterdir()] == ["step-00000001"]
    disk.left = 0
    assert save(manager, 3, 3.0).error is None and mark_of(tmp_path) == 3.0
    patient = manager.save_patiently(4, lambda: fragments(4.0), {"mark": 4.0})
    assert patient.error is None and mark_of(tmp_path) == 4.0


def test_a_look_at_the_directory_that_fails_is_a_fault_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a server of files is away for a moment: the save is tried again, and does not end the run."""
    manager, left, stat = CheckpointManager(tmp_path, 2), [2], Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path == tmp_path and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert save(manager, 1, 1.0).error is None and left == [0]


def test_a_directory_that_vanished_is_named_and_not_made_anew(tmp_path: Path, disk: Disk) -> None:
    run = tmp_path / "mount" / "run"
    run.mkdir(parents=True)
    manager = CheckpointManager(run, 2, files=disk)
    save(manager, 1, 1.0)
    shutil.rmtree(run / "checkpoints")
    assert save(manager, 2, 2.0).error is None, "with its run there, it can be made"
    disk.open.clear()
    manager.begin(3, fragments(3.0), {"mark": 3.0})
    assert disk.waits.wait(60)
    run.rename(tmp_path / "elsewhere")
    disk.open.set()
    for saved in (manager.wait(), manager.save_patiently(4, lambda: fragments(4.0), {"mark": 4.0})):
        assert saved is not None and isinstance(saved.error, StorageError), saved
        assert "No such file or directory" in str(saved.error) and str(run) in str(saved.error)
    assert list((tmp_path / "mount").iterdir()) == []
    assert mark_of(tmp_path / "elsewhere") == 2.0


def test_what_is_no_fault_of_storage_is_not_tried_again(tmp_path: Path, disk: Disk) -> None:
    manager = CheckpointManager(tmp_path, 2, files=disk)
    manager.begin(1, [Fragment(SPEC, "weight", 0, torch.zeros(8))], {})
    saved = manager.wait()
    assert saved is not None and "elements 8 to 32 are missing" in str(saved.error)
    assert isinstance(saved.error, CheckpointError) and not isinstance(saved.error, StorageError)
    assert list(manager.directory.iterdir()) == []


def test_a_thread_that_writes_is_no_progress_of_the_step_until_it_is_waited_for(tmp_path: Path, disk: Disk) -> None:
    manager = CheckpointManager(tmp_path, 1, files=disk)
    disk.pause_s = 0.2  # four files of two writes, and two of one
    before = progress.acts
    manager.begin(1, fragments(1.0), {"mark": 1.0})
    time.sleep(0.7)
    assert progress.acts == before and manager.ended() is None and manager.quiet_s() < 0.5
    manager.wait()
    assert progress.acts > before, "a slow disk is no hang"


def test_a_disk_that_hangs_is_noticed_and_left(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    manager = CheckpointManager(tmp_path, 1, files=disk)
    save(manager, 1, 1.0)
    disk.open.clear()
    manager.begin(2, fragments(2.0), {"mark": 2.0})
    assert disk.waits.wait(60)
    manager.quiet_s()
    time.sleep(0.3)
    assert manager.quiet_s() > 0.2
    before = progress.acts
    flight = manager._flight
    assert flight is not None and flight.wait(0.3) is None
    assert progress.acts == before, "so the watchdog ends a run that waits for it"
    manager.close(0.3)
    assert "step-00000002: was not saved: it does not go on" in caplog.messages[-1]
    assert mark_of(tmp_path) == 1.0


def test_the_disk_sees_the_same_calls_as_of_a_save_that_is_waited_for(tmp_path: Path) -> None:
    """So what a crash may leave (test_crash) is the same."""
    calls = []
    for name in ("waited", "beside"):
        files = RecordingFileSystem(tmp_path / name)
        (tmp_path / name).mkdir()
        manager = CheckpointManager(tmp_path / name / "run", 1, files=files)
        for mark, step in enumerate([1, 2, 2, 3], 1):
            if name == "waited":
                manager.save(step, fragments(float(mark)), {"mark": mark})
            else:
                save(manager, step, float(mark))
        calls.append([(call, path, more) for call, path, more in files.calls if call != "write"])
    assert calls[0] == calls[1] and len(calls[0]) > 60
