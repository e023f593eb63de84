"""The pool itself: results, failures with their rank, hung and dead workers, worlds that leave nothing behind."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.layout import RankLayout
from tests.worker_pool import WorkerError, WorkerPool, at_world_end


def total(rank: int, value: float) -> float:
    x = torch.tensor([value * rank])
    dist.all_reduce(x)
    return x.item()


def place(mesh) -> tuple[int, int]:
    return mesh.index("pipeline"), mesh.index("tensor")


def misbehave(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("wrong on purpose")
    if rank == 1 and how == "exit":
        raise SystemExit(3)
    if rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "hang":
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def unpicklable(rank: int):
    return lambda: rank


def count_worlds(rank: int) -> tuple[int, int]:
    if not hasattr(dist, "worlds_seen"):
        dist.worlds_seen = 0  # stands for the globals of some library

        def reset() -> None:
            assert dist.is_initialized()
            dist.worlds_seen += 1

        at_world_end.append(reset)
    return os.getpid(), dist.worlds_seen


def test_results_come_in_the_order_of_ranks(pool: WorkerPool):
    for world in (1, 3, 2):
        assert pool.run(total, 2.0, world=world) == [world * (world - 1.0)] * world
    assert pool.run(place, layout=RankLayout(pipeline=2, tensor=2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "rank 1 of 2: Traceback"),
        ("exit", "SystemExit: 3"),
        ("die", r"rank 1 of 2: the process died \(exit code -9\)"),
        ("hang", "rank 1 of 2: did not answer in time and was killed"),
    ],
)
def test_a_failure_is_reported_with_its_rank_and_costs_one_test(pool: WorkerPool, how, reason):
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=reason) as raised:
        pool.run(misbehave, how, world=2, timeout_s=5)
    assert time.monotonic() - begin < 20
    if how == "raise":
        assert str(raised.value).startswith("misbehave: rank 1") and "wrong on purpose" in str(raised.value)
    if how == "hang":
        assert "in misbehave" in str(raised.value)  # the stack of the worker that hung
    assert pool.run(total, 1.0, world=2) == [1.0] * 2


def test_a_result_that_does_not_pickle_is_an_error(pool: WorkerPool):
    with pytest.raises(WorkerError, match="unpicklable: rank 0 of 1"):
        pool.run(unpicklable, world=1)


def test_processes_are_kept_and_resets_run_after_each_world(pool: WorkerPool):
    (first, before), (second, after) = (pool.run(count_worlds, world=1)[0] for _ in range(2))
    assert first == second
    assert after == before + 1


def test_a_world_takes_well_under_a_second(pool: WorkerPool):
    pool.run(total, 1.0, world=4)
    seconds = []
    for _ in range(5):
        begin = time.monotonic()
        pool.run(total, 1.0, world=4)
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 1.0, seconds
