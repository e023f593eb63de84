"""Saving and resuming by several real processes over gloo."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalm.checkpoint import background
from megalm.checkpoint.manager import CheckpointManager
from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.exchange import together
from megalm.distributed.meeting import Meeting
from megalm.errors import CheckpointError, StorageError
from tests.checkpoint.simulated import HastyFileSystem, even_fragments, small_model, zero_fragments
from tests.worker_pool import WorkerPool

CUTS = {"weight": zero_fragments, "exp_avg": even_fragments}
"""Of the optimizers of ZeRO 2 and of ZeRO 3."""


def save_steps(rank: int, run: str, tensor: int, steps: list[int]) -> None:
    group = dist.group.WORLD
    assert group is not None
    manager = CheckpointManager(Path(run), 2, group, {"tensor": tensor, "data": group.size() // tensor})
    for step in steps:
        model = small_model(step)
        mine = [
            fragment
            for kind in ("weight", "exp_avg")
            for fragment in CUTS[kind](model, kind, tensor, group.size() // tensor)[rank]
        ]
        manager.save(step, iter(mine), {"step": step})


def resume(rank: int, run: str, tensor: int) -> tuple[int, str]:
    """Return the step that was found; all of this rank's part must be what was saved then."""
    group = dist.group.WORLD
    assert group is not None

    def load(reader: CheckpointReader) -> None:
        model = small_model(reader.step)
        with together(group):
            for fragment in zero_fragments(model, "exp_avg", tensor, group.size() // tensor)[rank]:
                stop = fragment.start + fragment.values.numel()
                assert torch.equal(reader.read_flat(fragment.shard, "exp_avg", fragment.start, stop), fragment.values)
            for name, item in model.items():
                spec = item.spec(name, rank % tensor, tensor)
                assert torch.equal(reader.read_local(spec, "weight"), item.local(name, rank % tensor, tensor))

    try:
        reader = CheckpointManager(Path(run), 2, group).latest(load)
    except CheckpointError as error:
        return -1, str(error)
    return (0, "") if reader is None else (reader.step, "")


def fail_on_one_rank(rank: int, run: str) -> str:
    """Return the error of a save in which rank 2 cannot write."""
    group = dist.group.WORLD
    assert group is not None
    manager = CheckpointManager(Path(run), 2, group)
    if rank == 2:
        create = os.open

        def refuse(path: str, *args: int, **more: int) -> int:
            if "rank-00002-weight" in str(path):
                raise OSError(28, "No space left on device", str(path))
            return create(path, *args, **more)

        os.open = refuse  # type: ignore[assignment]
    try:
        fragments = zero_fragments(small_model(), "weight", 1, group.size())[rank]
        manager.save(50, fragments, {})
    except CheckpointError as error:
        return str(error)
    finally:
        if rank == 2:
            os.open = create  # type: ignore[assignment]
    return "saved"


class Refusing(HastyFileSystem):
    """Refuses to create so many files."""

    left, code = 0, errno.EIO

    def create(self, path: Path) -> int:
        if self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code), str(path))
        return super().create(path)


def save_beside(rank: int, run: str) -> list[tuple[int, str, bool]]:
    """Save four times beside collectives of the main thread, on a disk that refuses rank 2 now and then.

    Return how each save ended: its step, its error, and whether that is one of storage.
    """
    group = dist.group.WORLD
    assert group is not None
    files, ends = Refusing(), []
    manager = CheckpointManager(Path(run), 2, group, {"data": 3}, files, Meeting.of_world("checkpoint"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background.try_to_save, "__defaults__", ((0.01, 0.01), True))
        patch.setattr(background, "_LOOK_S", 0.05)
        for step, refusals in ((1, 0), (2, 2), (3, 100), (4, 0)):
            files.left = refusals if rank == 2 else 0
            model = small_model(step)
            mine = [f for kind, cut in CUTS.items() for f in cut(model, kind, 1, 3)[rank]]
            manager.begin(step, iter(mine), {"step": step})
            for fragment in mine:
                fragment.values.zero_()  # training goes on
            total = torch.ones(4)
            for _ in range(8):
                dist.all_reduce(total)
            assert total.eq(3.0**8).all()
            saved = manager.wait()
            manager.taken()
            assert saved is not None
            ends.append((saved.step, str(saved.error or ""), isinstance(saved.error, StorageError)))
    return ends


def test_processes_save_beside_training_and_know_alike_of_a_fault_of_one(pool: WorkerPool, tmp_path: Path) -> None:
    answers = pool.run(save_beside, str(tmp_path), world=3)
    assert answers[0] == answers[1] == answers[2]
    assert [(step, bool(error), storage) for step, error, storage in answers[0]] == [
        (1, False, False), (2, False, False), (3, True, True), (4, False, False)
    ]  # fmt: skip
    assert "rank 2: " in answers[0][2][1] and "rank-00002-weight" in answers[0][2][1]
    assert os.strerror(errno.EIO) in answers[0][2][1]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert pool.run(resume, str(tmp_path), 1, world=2) == [(4, "")] * 2


def test_processes_save_together_and_resume_in_any_number(pool: WorkerPool, tmp_path: Path) -> None:
    run = str(tmp_path)
    assert pool.run(resume, run, 1, world=3) == [(0, "")] * 3
    kept = ["step-00000004", "step-00000005"]
    pool.run(save_steps, run, 2, [1, 4, 4, 5], world=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept
    assert pool.run(resume, run, 2, world=4) == [(5, "")] * 4
    assert pool.run(resume, run, 3, world=3) == [(5, "")] * 3

    errors = pool.run(fail_on_one_rank, run, world=4)
    assert len(set(errors)) == 1
    assert "rank 2" in errors[0] and "No space left on device" in errors[0] and "rank-00002-weight" in errors[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept

    newest = tmp_path / "checkpoints" / kept[1] / "rank-00003-optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    assert pool.run(resume, run, 1, world=2) == [(4, "")] * 2
    (tmp_path / "checkpoints" / kept[0] / "state.json").write_text("{}")
    answers = pool.run(resume, run, 1, world=2)
    assert answers[0] == answers[1] and answers[0][0] == -1 and "none of its 2 checkpoints is valid" in answers[0][1]
