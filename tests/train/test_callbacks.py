"""When metrics, evaluations and checkpoints are due, and what each of them is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megalm.data.loader import HeldOut
from megalm.data.token_file import TokenFile, TokenFileWriter
from megalm.data.windows import all_windows
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.train.callbacks import Evaluate, LogMetrics
from megalm.train.lr_schedules import learning_rate
from megalm.train.trainer import Trainer
from tests.parity.harness import VOCAB, Case, build_trainer, reference_run
from tests.worker_pool import WorkerPool

SMALL: dict[str, Any] = {"model.layers": 1, "model.hidden": 8, "model.heads": 2, "model.sequence": 8}
RECORD_KEYS = {
    "step", "tokens", "train/loss", "optim/lr", "optim/grad_norm", "time/step_s", "perf/tokens_per_s", "perf/tflops",
    "perf/mfu", "memory/peak_bytes", "time/data_s", "time/communication_s", "time/compute_s",
}  # fmt: skip


class Notes:
    """Stands for tracker, meter and checkpoint manager, and keeps what they are told."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.evaluations: list[Any] = []
        self.saves: list[Any] = []
        self.measured: list[tuple[int, int]] = []
        self.notes: list[str] = []
        self.clock_runs = True
        self.time_left_s = 0.5

    def log_step(self, record: Any, time_left_s: float) -> None:
        assert time_left_s == 0.5
        self.steps.append(record)

    def log_evaluation(self, record: Any) -> None:
        self.evaluations.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def measure(self, step: int, last_step: int) -> Notes:
        self.measured.append((step, last_step))
        return self

    def record(self) -> dict[str, float]:
        return {"time/step_s": 1.0, "perf/tokens_per_s": 2.0, "perf/tflops": 3.0, "perf/mfu": 4.0}

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.clock_runs = False
        yield
        self.clock_runs = True

    def save(self, step: int, fragments: Any, state: dict[str, Any]) -> Path:
        assert not self.clock_runs, "the time of a save counts as training"
        kinds = {fragment.kind for fragment in fragments}
        self.saves.append((step, kinds, state))
        return Path(f"step-{step}")


def trainer_of(mesh: ParallelMesh, steps: int, **overrides: Any) -> Trainer:
    layout = mesh.layout
    more = {"train.steps": steps, "lr_schedule.warmup_steps": 2, "loss.label_smoothing": 0.2, **overrides}
    return build_trainer(mesh, Case(layout.pipeline, layout.data, layout.tensor, {**SMALL, **more}).config())


def logged(mesh: ParallelMesh, every: int, steps: int, **overrides: Any) -> list[dict[str, float]]:
    notes, trainer = Notes(), trainer_of(mesh, steps, **overrides)
    memory = SimpleNamespace(record=lambda: {"memory/peak_bytes": 101})
    trainer.fit([LogMetrics(notes, notes, memory, every)])  # type: ignore[arg-type]
    assert notes.measured == [(record["step"], steps) for record in notes.steps]
    return notes.steps


@pytest.mark.parametrize(("every", "steps", "expected"), [(1, 2, [1, 2]), (3, 7, [1, 3, 6, 7]), (5, 2, [1, 2])])
def test_the_first_the_last_and_every_nth_step_are_logged(
    pool: WorkerPool, every: int, steps: int, expected: list[int]
) -> None:
    records = pool.run(logged, every, steps, layout=RankLayout())[0]
    assert [record["step"] for record in records] == expected
    assert all(record.keys() == RECORD_KEYS for record in records)


def test_a_record_holds_the_global_loss_norm_rate_tokens_and_memory(pool: WorkerPool) -> None:
    records = pool.run(logged, 1, 2, layout=RankLayout(data=2))
    config = Case(overrides={**SMALL, "train.steps": 2, "lr_schedule.warmup_steps": 2, "loss.label_smoothing": 0.2})
    _, losses, norms = reference_run(config.config(), 2)
    for mine in records:
        assert [record["train/loss"] for record in mine] == pytest.approx(losses, rel=1e-12)
        assert [record["optim/grad_norm"] for record in mine] == pytest.approx(norms, rel=1e-12)
        assert [record["optim/lr"] for record in mine] == [learning_rate(config.config(), step) for step in (0, 1)]
        assert [record["tokens"] for record in mine] == [64, 128]
        assert {record["memory/peak_bytes"] for record in mine} == {101}


FURTHER: dict[str, Any] = {"model.mtp_depth": 2, "model.layers": 2}


def logged_further(mesh: ParallelMesh, more: dict[str, Any]) -> list[dict[str, float]]:
    return logged(mesh, 1, 2, **FURTHER, **more)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (RankLayout(), {}),
        (RankLayout(pipeline=2, tensor=2), {"parallel.sequence": True, "train.recompute": "full"}),
        (RankLayout(data=2), {"zero.stage": 2}),
    ],
)
def test_the_loss_of_further_tokens_is_logged_beside_the_loss_that_it_is_part_of(
    pool: WorkerPool, layout: RankLayout, more: dict[str, Any]
) -> None:
    """At the first step losses of two weights differ by it alone."""
    values = {**SMALL, **FURTHER, "train.steps": 2, "lr_schedule.warmup_steps": 2, "loss.label_smoothing": 0.2}
    light, heavy = (reference_run(Case(overrides={**values, "loss.mtp": w}).config(), 1)[1][0] for w in (0.3, 1.3))
    for mine in pool.run(logged_further, more, layout=layout):
        assert mine[0].keys() == RECORD_KEYS | {"train/mtp_loss"}
        assert mine[0]["train/loss"] == pytest.approx(light, rel=1e-12)
        assert mine[0]["train/mtp_loss"] == pytest.approx(heavy - light, rel=1e-12)
        assert mine[1]["train/mtp_loss"] != mine[0]["train/mtp_loss"]


def evaluated(mesh: ParallelMesh, path: str, every: int, steps: int) -> tuple[list[dict[str, float]], float]:
    """Return the evaluations, and the plain loss of the final weights on the same windows."""
    notes, trainer = Notes(), trainer_of(mesh, steps)
    file = TokenFile(Path(path))
    held_out, model = HeldOut(file, all_windows(file, 8, "stream")), trainer.engine.module
    bytes_V = np.full(VOCAB, 3, dtype=np.int64)
    evaluate = Evaluate(notes, notes, model, held_out, bytes_V, every)  # type: ignore[arg-type]
    trainer.fit([evaluate])
    evaluate.at_end(trainer)
    batch = held_out.rows(0, len(held_out))
    with torch.no_grad():
        log_p = model(batch.tokens_BT)[..., :VOCAB].log_softmax(-1)
    nll = -log_p.gather(-1, batch.labels_BT[..., None])[..., 0]
    assert model.label_smoothing == 0.2
    return notes.evaluations, float(nll[batch.loss_mask_BT].mean())


def test_evaluation_is_due_every_nth_step_and_once_at_the_end_and_has_no_smoothing(
    pool: WorkerPool, tmp_path: Path
) -> None:
    path = tmp_path / "validation.tokens"
    with TokenFileWriter(path, VOCAB, "00" * 32) as writer:
        writer.append(np.arange(100) * 7 % VOCAB)
    for every, steps, expected in ((0, 3, [3]), (2, 3, [2, 3]), (2, 4, [2, 4])):
        records, loss = pool.run(evaluated, str(path), every, steps, layout=RankLayout())[0]
        assert [record["step"] for record in records] == expected
        assert records[-1]["evaluate/loss"] == pytest.approx(loss, rel=1e-12)
        assert records[-1]["evaluate/bits_per_byte"] == pytest.approx(loss / math.log(2.0) / 3.0, rel=1e-12)
