"""What holds the memory: seen on request, and said with a remedy when there is not enough of it."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import OutOfMemory
from megalm.launch.local import run_workers
from megalm.pipeline_parallel.executor import PipelineError
from megalm.train import memory
from megalm.train.memory import Memory, is_out_of_memory, remedies
from megalm.train.tracking import format_bytes
from megalm.zero.engine import HeldBytes
from tests.end_to_end.workplace import environment, make_workplace
from tests.train.recipes import small_recipe
from tests.train.test_callbacks import Notes, trainer_of
from tests.worker_pool import WorkerPool
from tests.zero.runs import run_steps

GIB = 2**30


def torch_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45, dtype=torch.uint8)
    return caught.value


def test_the_want_of_memory_is_told_from_other_errors() -> None:
    wrapped = PipelineError("pipeline stage 0 failed in forward of microbatch 0")
    wrapped.__cause__ = torch_error()
    lacking = [torch_error(), wrapped, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]
    assert [is_out_of_memory(error) for error in lacking] == [True] * 4
    others = [RuntimeError("gloo: connection closed"), PipelineError("failed"), ValueError(), None]
    assert [is_out_of_memory(error) for error in others] == [False] * 4


@pytest.mark.parametrize(
    ("data", "held", "activations", "sections", "expected"),
    [
        (1, (1, 2, 1, 2), 9, {}, ["train.micro_batch=1", "train.recompute=full"]),
        (4, (1, 2, 1, 20), 9, {}, ["zero.stage=1", "train.micro_batch=1", "train.recompute=full"]),
        (4, (1, 0, 1, 20), 9, {"zero": {"stage": 1}}, ["train.micro_batch=1", "train.recompute=full", "zero.stage=2"]),
        (4, (40, 0, 1, 20), 9, {"zero": {"stage": 2}, "train": {"micro_batch": 1}},
         ["zero.stage=3", "train.recompute=full"]),
        (4, (40, 0, 1, 20), 9, {"zero": {"stage": 3}, "train": {"micro_batch": 1, "recompute": "full"}},
         ["zero.config=zero3-offload"]),
        (4, (40, 0, 1, 20), 9, {"zero": {"stage": 2}, "train": {"recompute": "full"}, "parallel": {"pipeline": 2}},
         ["zero.config=zero2-offload", "train.micro_batch=1"]),
        (4, (40, 0, 1, 20), 9, {"zero": {"stage": 2}, "train": {"recompute": "full"}, "parallel": {"expert": 2},
                                "model": {"experts": 4}}, ["zero.config=zero2-offload", "train.micro_batch=1"]),
        (4, (9, 9, 9, 20), 9, {"overlap": {"gradients": True}, "train": {"recompute": "full"}},
         ["zero.stage=2", "train.micro_batch=1"]),
        (4, (40, 0, 1, 20), 9, {"zero": {"stage": 2}, "train": {"recompute": "full"}, "parallel": {"expert": 2},
                                "model": {"experts": 4}, "optim": {"kind": "apex_adamw"}}, ["train.micro_batch=1"]),
    ],
)  # fmt: skip
def test_remedies_fit_the_recipe_and_the_best_comes_first(
    data: int, held: tuple[int, int, int, int], activations: int, sections: dict[str, Any], expected: list[str]
) -> None:
    assert remedies(small_recipe(**sections), data, HeldBytes(*held), activations) == expected


def test_on_a_gpu_activations_may_leave_once_all_is_recomputed() -> None:
    held, on_gpu = HeldBytes(1, 2, 1, 2), {"data_size": 1, "activations": 9, "on_gpu": True}
    for train, expected in (
        ({"recompute": "none"}, "train.recompute=full"),
        ({"recompute": "full"}, "train.offload_activations=true"),
        ({"recompute": "full", "offload_activations": True}, None),
    ):
        config = small_recipe(train={**train, "micro_batch": 1})
        assert remedies(config, held=held, **on_gpu) == [expected] * (expected is not None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_rank_without_memory_says_what_holds_it_and_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = make_workplace(tmp_path / "place")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    command = [sys.executable, "-m", "tests.train.hungry", "1", "3", "recipe.yaml"]
    assert run_workers([*command, "zero.stage=1"], 2, place / "logs") == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "out of memory" in line]
    (line,) = lines
    assert re.fullmatch(
        r"\[rank 1\] error: rank 1 ran out of memory \(32768\.00 GiB more\) at step 3, forward and backward; it "
        r"holds weights 0 MiB, master weights 0 MiB, gradients 0 MiB, optimizer 0 MiB, activations \d+ MiB, the "
        r"program \d+ MiB \(peak \d+ MiB\); use .*train\.micro_batch=1.*, or split the model over more ranks .*",
        line,
    ), line
    assert "ran out of memory" not in (place / "logs" / "rank-0.log").read_text()


def memory_of(mesh: ParallelMesh, trainer: Any, run: Path, **profile: Any) -> tuple[Memory, Notes]:
    notes = Notes()
    config = trainer.config.model_copy(update={
        "run": trainer.config.run.model_copy(update={"dir": str(run)}),
        "profile": trainer.config.profile.model_copy(update=profile),
    })  # fmt: skip
    watch = Memory(config, mesh)
    watch.begin(trainer.engine, notes)  # type: ignore[arg-type]
    trainer.before_step.append(watch.before_step)
    trainer.before_update.append(watch.before_update)
    return watch, notes


def check_requests(mesh: ParallelMesh, run: Path) -> None:
    """Rank 1 is asked by the recipe for step 2, and by a signal during step 3 for step 4."""
    shape = {"model.hidden": 256, "model.heads": 2, "precision": "bf16", "zero.stage": 0}
    trainer = trainer_of(mesh, 5, **shape)
    watch, notes = memory_of(mesh, trainer, run, memory_at=2, ranks=(1,))

    class Signal:
        def after_step(self, trainer: Any, result: Any) -> None:
            if trainer.state.step == 3 and mesh.rank == 1:
                os.kill(os.getpid(), signal.SIGRTMIN)

        def at_end(self, trainer: Any) -> None:
            pass

    with watch.explained():
        trainer.fit([Signal(), watch])
    assert signal.getsignal(signal.SIGRTMIN) is signal.SIG_DFL
    assert len(notes.notes) == (2 if mesh.rank == 1 else 0)
    if mesh.rank == 1:
        files = sorted(path.name for path in run.glob("profile/*"))
        assert files == ["memory-step-2.rank-1.txt", "memory-step-4.rank-1.txt"]
        first, *lines = (run / "profile" / files[1]).read_text().splitlines()
        assert first.startswith("rank 1") and first.endswith("step 4")
        numbers = {line[:16].strip(): line[16:].strip() for line in lines}
        elements = sum(weight.numel() for weight in trainer.engine.module.parameters())
        assert numbers["weights"] == format_bytes(2 * elements) and elements > 2**19
        assert numbers["master weights"] == numbers["gradients"] == format_bytes(4 * elements)
        assert numbers["optimizer"] == format_bytes(8 * elements)
        assert float(numbers["the program"].split()[0]) > 0 and set(numbers) >= {"activations", "peak"}


def test_ranks_that_are_asked_write_what_they_hold(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_requests, tmp_path, layout=RankLayout(data=2))


def check_record(mesh: ParallelMesh, run: Path) -> None:
    """The rank that has most is told of, with what it holds there; all ranks say the same."""
    trainer = trainer_of(mesh, 3, precision="bf16", **{"zero.stage": 0, "model.hidden": 64, "model.heads": 2})
    watch, _ = memory_of(mesh, trainer, run)
    trainer.fit([watch])
    held = trainer.engine.held_bytes()
    watch._program = 1000
    peaks = [2**33, 2**33 + 5, 2**33 + 5, 7]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak_memory_bytes", lambda device: peaks[mesh.rank])
        record = watch.record()
    gradients = held.master_weights
    parts = (held.weights, held.master_weights, gradients, held.optimizer)
    assert record == {
        "memory/peak_bytes": peaks[1],
        "memory/peak_rank": 2,
        "memory/weights_bytes": held.weights,
        "memory/master_weights_bytes": held.master_weights,
        "memory/gradients_bytes": gradients,
        "memory/optimizer_bytes": held.optimizer,
        "memory/activations_bytes": peaks[1] - 1000 - sum(parts),
        "memory/program_bytes": 1000,
    }
    assert held.optimizer == 2 * held.master_weights == 4 * held.weights > 0 == held.gradients


def test_a_line_of_metrics_says_which_rank_needs_most_and_for_what(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_record, tmp_path, layout=RankLayout(data=4))


def check_offloaded(mesh: ParallelMesh, run: Path) -> None:
    trainer = trainer_of(mesh, 2, **{"train.offload_activations": True})
    watch, _ = memory_of(mesh, trainer, run)
    trainer.fit([watch])
    module: Any = trainer.engine.module
    assert (
        watch.record()["memory/offloaded_bytes"] == module.offload.host_bytes.peak > 0 == module.offload.host_bytes.now
    )


def test_so_does_what_lies_in_the_host_s_memory(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_offloaded, tmp_path, layout=RankLayout())


def check_any_time(mesh: ParallelMesh) -> None:
    for zero in ({"zero.stage": 0}, {"zero.stage": 1}, {"zero.stage": 2}, {"zero.stage": 3},
                 {"zero.stage": 2, "zero.config": "zero2-offload"}):  # fmt: skip
        trainer = trainer_of(mesh, 3, **zero, precision="bf16")
        before = trainer.engine.held_bytes()
        seen: list[HeldBytes] = []
        engine, done = trainer.engine, trainer.engine.microbatch_done

        def done_and_look(engine: Any = engine, done: Any = done, seen: list[HeldBytes] = seen) -> None:
            done()
            seen.append(engine.held_bytes())

        engine.microbatch_done = done_and_look  # type: ignore[method-assign]
        run_steps(trainer, 2)
        after = trainer.engine.held_bytes()
        assert after.weights == before.weights > 0 and after.optimizer >= before.optimizer, zero
        assert all(held.gradients > 0 for held in seen) and len(seen) == 2 * 2, zero


def test_what_is_held_can_be_asked_at_any_time(pool: WorkerPool) -> None:
    pool.run(check_any_time, layout=RankLayout(data=2))


def test_on_cuda_a_request_records_one_step_and_writes_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *args, **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    monkeypatch.setattr(memory, "used_memory_bytes", lambda device: 9 * GIB)
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda device: 30 * GIB)
    held = HeldBytes(1 * GIB, 2 * GIB, 2 * GIB, 3 * GIB)
    engine = SimpleNamespace(held_bytes=lambda: held)
    trainer = SimpleNamespace(state=SimpleNamespace(step=0), engine=engine)
    mesh = SimpleNamespace(rank=0, device=torch.device("cuda", 0), size=lambda axis: 4)
    config = small_recipe(run={"dir": str(tmp_path)}, profile={"memory_at": 2})
    watch, notes = Memory(config, mesh), Notes()  # type: ignore[arg-type]
    watch.begin(engine, notes)  # type: ignore[arg-type]
    for step in range(3):
        watch.before_step(trainer)  # type: ignore[arg-type]
        watch.before_update(trainer)  # type: ignore[arg-type]
        trainer.state.step = step + 1
        watch.after_step(trainer, None)  # type: ignore[arg-type]
    assert calls == [{"max_entries": memory._HISTORY}, "memory-step-2.rank-0.pickle", {"enabled": None}]
    assert "activations 21.00 GiB, the program 1.00 GiB, peak 30.00 GiB" in notes.notes[0]
    monkeypatch.setattr(memory, "used_memory_bytes", lambda device: 20 * GIB)
    with pytest.raises(OutOfMemory) as caught, watch.explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
    assert "rank 0 ran out of memory (2.00 GiB more) at step" in str(caught.value)
    assert "activations 11.00 GiB" in str(caught.value)
    assert "use train.micro_batch=1 or train.recompute=full or zero.stage=1, or split" in str(caught.value)
    assert "\n" not in str(caught.value) and calls[3] == "out-of-memory.rank-0.pickle"
