"""The checkpoints of a run: retention, falling back, left-overs; and the two commands."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.commands import diff, inspect, verify
from megalm.checkpoint.manager import CheckpointManager, latest_checkpoint
from megalm.checkpoint.names import find_checkpoints, hidden
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.retention import Keep
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError

SPEC = ShardSpec.whole("x.weight", (4, 8))


def save(manager: CheckpointManager, step: int, mark: float = 0.0) -> Path:
    values = torch.full((32,), mark)
    return manager.save(step, [Fragment(SPEC, "weight", 0, values)], {"step": step, "mark": mark})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(path: Path) -> None:
    file = path / "rank-00000-weight.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_new_run_has_none_and_then_the_newest(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run", 3)
    assert manager.latest() is None and latest_checkpoint(tmp_path / "elsewhere") is None
    assert not (tmp_path / "run").exists(), "looking must not make anything"
    for step in (5, 10, 99_999_999, 100_000_000):
        save(manager, step)
    latest = manager.latest()
    assert latest is not None and latest.step == 100_000_000
    assert [p.name for p in find_checkpoints(manager.directory)] == [
        "step-100000000",
        "step-99999999",
        "step-00000010",
    ], "the newest by number, not by name"


def test_retention_keeps_the_newest_and_never_what_was_just_saved(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2)
    for step in range(1, 5):
        save(manager, step)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(CheckpointManager(tmp_path, 1), 5)
    assert names(tmp_path) == ["step-00000005"]
    with pytest.raises(CheckpointError, match=r"keep=0.*use 1 or more"):
        CheckpointManager(tmp_path, 0)


def test_a_run_that_goes_back_finds_an_earlier_one_and_drops_the_later(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 3)
    for step in (10, 20, 30):
        save(manager, step)
    tries = [[31], [30], [20], [20, 30], [10, 30], [10]]
    earlier = [manager.latest(before=steps) for steps in tries]
    assert [reader and reader.step for reader in earlier] == [30, 20, 10, 10, 20, 30]
    manager.drop_after(10)
    assert names(tmp_path) == ["step-00000010"]
    save(manager, 10, mark=1.0)
    latest = manager.latest()
    assert latest is not None and latest.state["mark"] == 1.0


def test_a_run_that_goes_back_tries_all_that_there_is(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 3)
    paths = [save(manager, step) for step in (10, 20, 30)]
    damage(paths[0])
    latest = manager.latest(before=[15])
    assert latest is not None and latest.step == 30 and list(manager.passed_over) == [10]
    damage(paths[1])
    latest = manager.latest(before=[15, 25])
    assert latest is not None and latest.step == 30 and list(manager.passed_over) == [10, 20]
    damage(paths[2])
    with pytest.raises(CheckpointError, match=r"none of its 3 checkpoints is valid \(.*step-00000010/rank"):
        manager.latest(before=[15])


def test_damaged_ones_neither_count_nor_stay_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 4)
    for step, loss in ((36, 0.2), (38, 0.3), (39, 0.3), (40, 0.1)):
        state = {"metric": {"name": "loss", "value": loss, "step": step}}
        manager.save(step, [Fragment(SPEC, "weight", 0, torch.zeros(32))], state)
    damage(manager.directory / "step-00000040")
    again = CheckpointManager(tmp_path, Keep(2, every=40, best="loss"))
    latest = again.latest()
    assert latest is not None and latest.step == 39
    save(again, 39)  # has no metric now
    assert names(tmp_path) == [f"step-000000{step}" for step in (36, 38, 39, 40)], "no newer one than 40 is there yet"
    save(again, 42)
    assert names(tmp_path) == [f"step-000000{step}" for step in (36, 39, 42)], "the best that is whole and two more"
    save(again, 40)
    assert names(tmp_path) == [f"step-000000{step}" for step in (36, 39, 40, 42)], "what was saved again is whole"


def test_what_a_run_deletes_while_it_is_read_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run deletes a checkpoint, as retention does, once its manifest was read, and has saved another."""
    manager = CheckpointManager(tmp_path, 1)
    save(manager, 1)
    known: list[int] = []

    def load(reader: CheckpointReader) -> None:
        known.append(reader.step)
        if reader.step < 3:
            save(manager, reader.step + 1)
        reader.verify_files()

    latest = latest_checkpoint(tmp_path, load)
    assert latest is not None and latest.step == 3 and known == [1, 2, 3] and caplog.records == []

    def lose(reader: CheckpointReader) -> None:
        shutil.rmtree(reader.directory)
        reader.verify_files()

    with pytest.raises(CheckpointError, match="all its checkpoints went away while they were read; see who"):
        manager.latest(lose)  # and not None, by which a run would begin anew


def test_commands_beside_a_run_that_deletes_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    managers = [CheckpointManager(tmp_path / run, 2) for run in "ab"]
    saves: list[int] = []

    class Slow(CheckpointReader):
        def __init__(self, directory: Path) -> None:
            super().__init__(directory)
            for manager in managers if saves else ():
                save(manager, saves[0])
            del saves[:1]

    for manager in managers:
        save(manager, 1), save(manager, 2)
    monkeypatch.setattr("megalm.checkpoint.commands.CheckpointReader", Slow)
    saves += [3]
    found = verify(tmp_path / "a")
    assert [item["step"] for item in found["checkpoints"]] == [2]
    assert found["deleted_meanwhile"] == [str(tmp_path / "a" / "checkpoints" / "step-00000001")]
    damage(managers[0].directory / "step-00000003")
    saves += [4]
    with pytest.raises(CheckpointError, match=r"step-00000003/rank.*\(and 1 deleted meanwhile by the run\)"):
        verify(tmp_path / "a")
    for manager in managers:
        manager.keep = Keep(1)
        save(manager, 5)
    saves += [6]
    with pytest.raises(CheckpointError, match="1 deleted meanwhile by the run, and no other was there; try again"):
        verify(tmp_path / "a")
    saves += [7]
    assert inspect(tmp_path / "a")["step"] == 7
    saves += [8, 9]
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found["equal"] and [Path(found[which]).name for which in ("first", "second")] == 2 * ["step-00000009"]
    damage(managers[1].directory / "step-00000009")
    with pytest.raises(CheckpointError, match="b/checkpoints/step-00000009/rank"):
        diff(tmp_path / "a", tmp_path / "b")


def test_damaged_ones_are_passed_over_loudly_and_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(tmp_path, 3)
    paths = [save(manager, step, step) for step in (1, 2, 3)]
    damage(paths[2])
    (paths[1] / "manifest.json").unlink()
    latest = manager.latest()
    assert latest is not None and latest.step == 1
    assert all(str(path) in reason for path, reason in zip(paths[:0:-1], manager.passed_over.values(), strict=True))
    assert caplog.records == [], "whoever asks a manager tells of them"
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.step == 1
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "SKIPPING DAMAGED CHECKPOINT step-00000003",
        "SKIPPING DAMAGED CHECKPOINT step-00000002",
    ]
    assert all(record.levelno == logging.WARNING and "\n" not in record.getMessage() for record in caplog.records)
    save(CheckpointManager(tmp_path, 1), 2, 2.5)
    latest = manager.latest()
    assert latest is not None and latest.state["mark"] == 2.5
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    damage(paths[1])
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is valid .*--fresh"):
        manager.latest()


def test_left_overs_are_cleared_by_a_manager_and_not_by_a_reader(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2)
    first = save(manager, 1, 1.0)
    for role in ("partial", "deleted"):
        hidden(manager.directory / "step-00000002", role).mkdir()
    hidden(first, "replaced").mkdir()
    (manager.directory / "notes.txt").write_text("mine")
    assert latest_checkpoint(tmp_path) is not None and len(names(tmp_path)) == 5
    CheckpointManager(tmp_path, 2)
    assert names(tmp_path) == ["notes.txt", "step-00000001"]


def test_what_was_set_aside_for_an_unfinished_replacement_comes_back(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2)
    first = save(manager, 1, 1.0)
    first.rename(hidden(first, "replaced"))
    hidden(first, "partial").mkdir()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.state["mark"] == 1.0
    CheckpointManager(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_a_failing_source_of_fragments_leaves_no_partial_directory(tmp_path: Path) -> None:
    def fragments():  # type: ignore[no-untyped-def]
        yield Fragment(SPEC, "weight", 0, torch.zeros(32))
        raise RuntimeError("device lost")

    manager = CheckpointManager(tmp_path, 2)
    with pytest.raises(RuntimeError, match="device lost"):
        manager.save(1, fragments(), {})
    assert names(tmp_path) == []


def test_inspect_and_verify_answer_for_a_run_and_for_one_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 3, layout={"tensor": 1, "data": 1, "zero": 1})
    for step in (1, 2):
        fragments = [
            Fragment(SPEC, "weight", 0, torch.zeros(32)),
            Fragment(SPEC, "exp_avg", 0, torch.zeros(32)),
        ]
        path = manager.save(step, fragments, {"step": step})
    for target in (tmp_path, path):
        found = inspect(target)
        assert found["step"] == 2 and found["tensors"] == 1 and found["parameters"] == 32 and found["dtype"] == "F32"
        assert found["bytes"] == {"exp_avg": 128, "weight": 128}
        assert found["layout"] == {"tensor": 1, "data": 1, "zero": 1} and found["state"] == {"step": 2}
        assert found["total_bytes"] == sum(file["bytes"] for file in found["files"])
    assert [item["step"] for item in verify(tmp_path)["checkpoints"]] == [2, 1]
    damage(manager.directory / "step-00000001")
    assert [item["step"] for item in verify(path)["checkpoints"]] == [2]
    with pytest.raises(CheckpointError, match=r"step-00000001/rank-00000-weight.*SHA-256.*1 good"):
        verify(tmp_path)
    for missing in (tmp_path / "nothing", tmp_path / "checkpoints" / "step-00000009"):
        with pytest.raises(CheckpointError, match="checkpoint"):
            inspect(missing)
