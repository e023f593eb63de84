"""DeepSpeed's calls, counted and timed: what the table says is so, and the run computes the same."""

from __future__ import annotations

import gc
import json
import logging
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.train.trainer import Trainer
from megalm.zero.call_log import CallLog, wait_for_each_call
from megalm.zero.engine import shard_of
from tests.end_to_end.workplace import make_workplace, megalm
from tests.parity.harness import Case, build_trainer
from tests.worker_pool import WorkerPool
from tests.zero.runs import run_steps


def test_calls_are_added_up_by_name_and_size() -> None:
    reset: list[str] = []
    log = CallLog(reset.append)
    for milliseconds, size in ((2.0, 1024), (4.0, 1024), (7.0, 8)):
        log.append("all_reduce", "all_reduce", milliseconds, size)
    assert reset == ["all_reduce"] * 3, "or the next call would be given the time of all before it"
    head, *rows = log.table()
    assert head.split() == ["call", "of", "DeepSpeed", "bytes", "a", "call", "calls", "total", "ms", "mean", "ms"]
    assert rows[0].split() == ["all_reduce", "8", "1", "7.00", "7.000"]
    assert rows[1].split() == ["all_reduce", "1,024", "2", "6.00", "3.000"]
    log.forget()
    assert log.table() == [head]


class Backend:
    """A backend whose calls return at once."""

    def __init__(self) -> None:
        self.waited: list[str] = []

    def _begin(self, tensor: str) -> Any:
        return SimpleNamespace(wait=lambda: self.waited.append(tensor))

    def all_gather(self, tensor: str, async_op: bool) -> Any:
        return self._begin(tensor) if async_op else None

    def get_rank(self) -> int:
        return 3

    def isend(self, tensor: str) -> Any:
        return self._begin(tensor)


def test_calls_that_return_at_once_are_waited_for() -> None:
    """But messages, whose other side may have to be called first."""
    backend = Backend()
    wait_for_each_call(backend)
    assert backend.get_rank() == 3 and backend.all_gather("one", False) is None
    assert backend.all_gather("two", True) is not None and backend.isend("three") is not None
    assert backend.waited == ["two"]


def calls_of(trainer: Trainer) -> dict[str, tuple[int, int, float]]:
    """Return (bytes in all, calls, ms in all) by name."""
    found: dict[str, tuple[int, int, float]] = {}
    for row in trainer.engine.report()[1:]:
        name, size, calls, total, _ = row.replace(",", "").split()
        old = found.get(name, (0, 0, 0.0))
        found[name] = (old[0] + int(size) * int(calls), old[1] + int(calls), old[2] + float(total))
    return found


def watched(mesh: ParallelMesh, stage: int) -> tuple[int, dict[str, tuple[int, int, float]]]:
    """Return the bytes of all weights and the calls of two steps; fail unless these compute as when nobody counts."""
    zero = {"zero.stage": stage}
    plain = build_trainer(mesh, Case(1, 2, 1, zero).config())
    assert plain.engine.report() == []
    expected = run_steps(plain, 2)
    trainer = build_trainer(mesh, Case(1, 2, 1, {**zero, "zero.config": "profiling"}).config())
    assert calls_of(trainer) == {}, "what building the engine took"
    begin = time.perf_counter()
    assert run_steps(trainer, 2) == expected
    found = calls_of(trainer)
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    assert 0.0 < sum(total for _, _, total in found.values()) < elapsed_ms, (found, elapsed_ms)
    parameters = list(trainer.engine.module.parameters())
    assert build_trainer(mesh, Case(1, 2, 1, zero).config()).engine.report() == [], "of another JSON"
    return sum(math.prod(shard_of(p).local_shape) * p.element_size() for p in parameters), found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_table_has_a_runs_calls_and_their_time(pool: WorkerPool, stage: int) -> None:
    (weights, one), (_, other) = pool.run(watched, stage, layout=RankLayout(data=2))
    assert {name: row[:2] for name, row in one.items()} == {name: row[:2] for name, row in other.items()}
    assert one["all_reduce"][0] == 2 * weights * (1 if stage == 1 else 2), "of two steps with two microbatches"
    assert one["all_gather_into_tensor"][0] >= weights


def of_process(mesh: ParallelMesh, path: str | None) -> tuple[bool, int, list[str]]:
    """Return whether garbage is collected, the level of DeepSpeed's log, and the table of the world before."""
    zero = {"zero.stage": 1} | ({"zero.config": path} if path else {})
    trainer = build_trainer(mesh, Case(1, 1, 1, zero).config())
    return gc.isenabled(), logging.getLogger("DeepSpeed").level, trainer.engine.report()


def test_what_a_json_says_of_the_process_ends_with_the_world(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = {"disable_python_gc": True, "log_level": "ERROR", "comms_logger": {"enabled": True}}
    path.write_text(json.dumps(content))
    (said,) = pool.run(of_process, str(path), layout=RankLayout())
    assert said[:2] == (False, logging.ERROR) and len(said[2]) == 1
    (said,) = pool.run(of_process, None, layout=RankLayout())
    assert said == (True, logging.WARNING, [])


@pytest.mark.slow
def test_a_run_ends_with_the_table(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    command = ("train", "--nproc", "2", "recipe.yaml", "train.steps=2", "zero.stage=2", "zero.config=profiling")
    done = megalm(place, *command, "checkpoint.at_end=false")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.startswith("call of DeepSpeed"))
    assert {line.split()[0] for line in lines[at + 1 :]} >= {"all_reduce", "all_gather_into_tensor"}, lines[at:]
