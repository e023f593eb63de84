"""Saving and resuming by several real processes over gloo."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megalm.checkpoint.manager import CheckpointManager
from megalm.errors import CheckpointError
from tests.checkpoint.simulated import small_model, zero_fragments
from tests.worker_pool import WorkerPool


def save_steps(rank: int, run: str, tensor: int, steps: list[int]) -> None:
    group = dist.group.WORLD
    assert group is not None
    manager = CheckpointManager(Path(run), 2, group, {"tensor": tensor, "data": group.size() // tensor})
    for step in steps:
        model = small_model(step)
        mine = [
            fragment
            for kind in ("weight", "exp_avg")
            for fragment in zero_fragments(model, kind, tensor, group.size() // tensor)[rank]
        ]
        manager.save(step, iter(mine), {"step": step})


def resume(rank: int, run: str, tensor: int) -> tuple[int, str]:
    """Return the step that was found; all of this rank's part must be what was saved then."""
    group = dist.group.WORLD
    assert group is not None
    try:
        reader = CheckpointManager(Path(run), 2, group).latest()
    except CheckpointError as error:
        return -1, str(error)
    if reader is None:
        return 0, ""
    model = small_model(reader.step)
    for fragment in zero_fragments(model, "exp_avg", tensor, group.size() // tensor)[rank]:
        stop = fragment.start + fragment.values.numel()
        assert torch.equal(reader.read_flat(fragment.shard, "exp_avg", fragment.start, stop), fragment.values)
    for name, item in model.items():
        spec = item.spec(name, rank % tensor, tensor)
        assert torch.equal(reader.read_local(spec, "weight"), item.local(name, rank % tensor, tensor))
    return reader.step, ""


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
