"""Crashes: of the machine (a model of a disk that loses what was not synced) and of the process (SIGKILL)."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.checkpoint.commands import verify
from megalm.checkpoint.manager import CheckpointManager, latest_checkpoint
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError
from tests.checkpoint.disk_model import Calls, RecordingFileSystem, crashes
from tests.worker_pool import WorkerPool

SPEC = ShardSpec.whole("x", (64,))
STEPS = (1, 2, 2, 3)
"""What is saved: a first step, another (which the first gives way to), the same again, and one more."""
Record = tuple[Calls, list[int]]
"""Calls, and how many had been made when each save returned."""


def save(manager: CheckpointManager, step: int, mark: int) -> None:
    values = torch.full((64,), float(mark))
    manager.save(step, [Fragment(SPEC, kind, 0, values) for kind in ("weight", "exp_avg")], {"mark": mark})


def save_beside(manager: CheckpointManager, step: int, mark: int) -> None:
    """Save in the thread beside training, and wait for it as a run does before its next save."""
    values = torch.full((64,), float(mark))
    manager.begin(step, [Fragment(SPEC, kind, 0, values) for kind in ("weight", "exp_avg")], {"mark": mark})
    values.zero_()
    saved = manager.wait()
    manager.taken()
    assert saved is not None and saved.error is None, saved


def mark_of(run: Path) -> int | None:
    """Return which save the newest valid checkpoint is of; its parts must all be of that save."""
    reader = latest_checkpoint(run)
    if reader is None:
        return None
    mark = int(reader.state["mark"])
    for kind in ("weight", "exp_avg"):
        assert reader.read_local(SPEC, kind).eq(mark).all()
    reader.close()
    return mark


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return the calls of four saves by one process; keep=1."""
    root = tmp_path_factory.mktemp("record")
    files = RecordingFileSystem(root)
    manager = CheckpointManager(root / "run", 1, files=files)
    done = [0]
    for mark, step in enumerate(STEPS, 1):
        save(manager, step, mark)
        done.append(len(files.calls))
    return files.calls, done


def record_rank(rank: int, root: str) -> tuple[Calls, list[int], list[int]]:
    """Save as one of two ranks, each half of every tensor; return the calls, their times, and those of the returns."""
    files = RecordingFileSystem(Path(root))
    manager = CheckpointManager(Path(root) / "run", 1, dist.group.WORLD, files=files)
    returned = []
    for mark, step in enumerate(STEPS, 1):
        half = torch.full((32,), float(mark))
        manager.save(step, [Fragment(SPEC, kind, 32 * rank, half) for kind in ("weight", "exp_avg")], {"mark": mark})
        returned.append(time.monotonic_ns())
    return files.calls, files.times_ns, returned


@pytest.fixture(scope="module")
def records_of_two(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Return what two ranks did, in the order in which they did it, and in others that they might have taken."""
    ranks = pool.run(record_rank, str(tmp_path_factory.mktemp("two")), world=2)
    timed = [
        (at, rank, call) for rank, (calls, times, _) in enumerate(ranks) for at, call in zip(times, calls, strict=True)
    ]
    timed.sort(key=lambda item: item[0])
    done = [0, *(sum(at <= end for at, _, _ in timed) for end in ranks[0][2])]
    merged = [(rank, call) for _, rank, call in timed]
    assert {rank for rank, _ in merged} == {0, 1} and done[-1] == len(merged)
    return [([call for _, call in one], done) for one in (merged, *(reordered(merged, seed) for seed in range(2)))]


def reordered(merged: list[tuple[int, Any]], seed: int) -> list[tuple[int, Any]]:
    """Return the calls with those on the ranks' own files, between which no rank waits, interleaved anew."""
    choose, out, block = random.Random(seed), [], []
    for item in [*merged, None]:
        if item is not None and Path(item[1][1]).name.startswith("rank-"):
            block.append(item)
            continue
        parts = [[own for own in block if own[0] == rank] for rank in (0, 1)]
        while any(parts):
            out.append(choose.choice([part for part in parts if part]).pop(0))
        block = []
        out += [item] if item is not None else []
    return out


def broken_promises(
    calls: Calls, done: list[int], directory: Path, caplog: pytest.LogCaptureFixture, tries: int = 6
) -> Iterator[str]:
    """Yield what goes wrong after a crash at some point: a lost save, a damaged checkpoint, an error."""
    caplog.set_level(logging.WARNING)
    for made, finished, disk in crashes(calls, done, directory, tries):
        last = calls[made - 1][:2]
        caplog.clear()
        try:
            mark = mark_of(disk / "run") or 0
            CheckpointManager(disk / "run", 1)
            if mark:
                verify(disk / "run")  # no half deleted one either
            again = mark_of(disk / "run") or 0
        except CheckpointError as error:
            yield f"after {last}: {error}"
            continue
        if not finished <= mark == again <= finished + 1:
            yield f"after {last}: save {mark}, then {again}, where {finished} had returned"
        if caplog.records:
            yield f"after {last}: {caplog.messages[0]}"


def test_every_crash_leaves_the_old_or_the_new_checkpoint(
    record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(broken_promises(*record, tmp_path, caplog)) == []
    assert len(list(tmp_path.iterdir())) > 200, "different states of the disk"


def test_every_crash_of_two_ranks_leaves_the_old_or_the_new_checkpoint(
    records_of_two: list[Record], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len({str(calls) for calls, _ in records_of_two}) > 1, "orders that differ"
    for number, (calls, done) in enumerate(records_of_two):
        (tmp_path / str(number)).mkdir()
        assert list(broken_promises(calls, done, tmp_path / str(number), caplog, tries=2)) == []
    assert len(list((tmp_path / "0").iterdir())) > 200


def second_save_without(record: Record, call: str, name: str) -> Record:
    """Return the record up to the second save, without the fsyncs of one file or directory in that save."""
    calls, done = record
    kept = [
        entry
        for index, entry in enumerate(calls[: done[2]])
        if index < done[1] or entry[0] != call or Path(entry[1]).name != name
    ]
    assert len(kept) < done[2], f"no {call} of {name}"
    return kept, [*done[:2], len(kept)]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("fsync", "rank-00000-weight.safetensors"),
        ("fsync", "rank-00000-optimizer.safetensors"),
        ("fsync", "state.json"),
        ("fsync", "manifest.json"),
        ("fsync-directory", ".step-00000002.partial"),
        ("fsync-directory", "checkpoints"),
    ],
)
def test_each_fsync_is_needed(
    record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str, name: str
) -> None:
    calls, done = second_save_without(record, call, name)
    assert next(broken_promises(calls, done, tmp_path, caplog), None) is not None


@pytest.mark.parametrize("name", ["rank-00001-weight.safetensors", "rank-00001-optimizer.safetensors"])
def test_each_fsync_of_another_rank_is_needed(
    records_of_two: list[Record], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    calls, done = second_save_without(records_of_two[0], "fsync", name)
    assert next(broken_promises(calls, done, tmp_path, caplog), None) is not None


KILLS = 30
KILL_LOOP = f"""
import json, logging, os, random, signal, sys, time
from pathlib import Path
from megalm.checkpoint.commands import verify
from megalm.checkpoint.manager import CheckpointManager
from tests.checkpoint.test_crash import mark_of, save, save_beside

logging.disable(logging.ERROR)
run, chosen, inside, last = Path(sys.argv[1]), random.Random(7), 0, 0
for kill in range({KILLS}):
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        manager = CheckpointManager(run, 1 + kill % 2)
        mark = mark_of(run) or 0
        while True:
            mark += 1
            (save if kill % 4 < 2 else save_beside)(manager, (mark + 1) // 2, mark)   # each step twice
            os.write(say, mark.to_bytes(8, "little"))
    os.close(say)
    begin = time.monotonic()
    last = int.from_bytes(os.read(said, 8), "little")
    time.sleep(chosen.uniform(0.0, time.monotonic() - begin))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while mark := os.read(said, 8):
        last = int.from_bytes(mark, "little")
    os.close(said)
    inside += any(path.name.startswith(".") for path in (run / "checkpoints").glob(".*"))
    found = mark_of(run) or 0
    assert last <= found <= last + 1, (kill, last, found)
    last = found
print(json.dumps([inside, last]))
"""


def test_a_process_killed_at_random_moments_loses_no_finished_save(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILL_LOOP, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    inside, saves = json.loads(ended.stdout)
    assert inside > KILLS // 10, f"only {inside} of {KILLS} kills fell inside a save"
    assert saves >= KILLS
