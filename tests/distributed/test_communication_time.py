"""Waiting for others counts, own work does not; torch.distributed is as it was afterwards."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.communication_time import CommunicationClock
from tests.worker_pool import WorkerPool

LATE_S = 0.3


def waits(rank: int) -> dict[str, float]:
    """Return the seconds that this rank stood in each kind of communication, for which rank 1 comes late."""
    originals = dist.all_reduce, dist.Work.wait
    x, found = torch.ones(4), {}

    def all_reduce() -> None:
        dist.all_reduce(x)

    def handle() -> None:
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        work.wait()

    def message() -> None:
        if rank == 1:
            dist.send(x, 0)
        else:
            dist.recv(x, 1)

    def gather() -> None:
        dist.all_gather_into_tensor(torch.empty(8), x)

    with CommunicationClock(torch.device("cpu")) as clock:
        for call in (all_reduce, handle, message, gather):
            dist.barrier()
            clock.take()
            if rank == 1:
                time.sleep(LATE_S)
            call()
            found[call.__name__] = clock.take()
        time.sleep(0.1)
        assert clock.take() == 0.0
        try:
            dist.all_reduce(x, group="no group")  # type: ignore[arg-type]
        except Exception:
            clock.take()
        else:
            raise AssertionError("a group of that name was found")
        dist.barrier()
        assert clock.take() > 0.0, "a failed call leaves the clock running"
    assert (dist.all_reduce, dist.Work.wait) == originals
    dist.barrier()
    assert clock.take() == 0.0
    return found


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_who_waits_is_told_from_who_is_waited_for(pool: WorkerPool) -> None:
    early, late = pool.run(waits, world=2)
    assert all(LATE_S - 0.05 < seconds < LATE_S + 0.25 for seconds in early.values()), early
    assert all(seconds < 0.15 for seconds in late.values()), late
