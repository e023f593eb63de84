"""What ranks tell each other from a thread beside the main one, while that is in collectives of its own."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.exchange import gather_distinct, gather_json, rank_of, size_of, together
from megalm.distributed.meeting import Meeting
from megalm.errors import CheckpointError, DistributedError, StorageError
from tests.worker_pool import WorkerPool

ROUNDS = 12


def in_a_thread(work: Any) -> Any:
    """Return what `work` returns in a thread beside this one, which meanwhile uses the world's group."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    total = torch.zeros(1)
    for _ in range(5):
        total += 1.0
        dist.all_reduce(total)
    thread.join(60)
    return results[0]


def exchange(rank: int) -> tuple[list[Any], int]:
    """Return what rank 0 gathered in the last of many rounds, and the keys that the store has more than at first."""
    meeting = Meeting.of_world("test")
    store = dist.distributed_c10d._get_default_store()
    assert (rank_of(meeting), size_of(meeting)) == (rank, 3)

    def work() -> list[Any]:
        for number in range(ROUNDS):
            time.sleep(0.003 * rank)
            with together(meeting):
                pass
            found = gather_json({"rank": rank, "number": number, "text": "ä" * 50}, meeting)
        return found

    dist.barrier()
    before = store.num_keys()
    found = in_a_thread(work)
    dist.barrier()
    return found, store.num_keys() - before


def test_values_of_all_ranks_come_in_order_and_are_not_kept(pool: WorkerPool) -> None:
    answers = pool.run(exchange, world=3)
    last = [{"rank": rank, "number": ROUNDS - 1, "text": "ä" * 50} for rank in range(3)]
    assert [found for found, _ in answers] == [last, [], []]
    assert max(more for _, more in answers) < 20, "of 24 rounds with 3 keys and more each"


def fail(rank: int, wrong: dict[int, Exception]) -> tuple[str, str]:
    meeting = Meeting.of_world("test")
    first = meeting.acts(5 + rank)
    try:
        with together(meeting):
            if rank in wrong:
                time.sleep(0.05 * (3 - rank))  # the lowest of them comes last
                raise wrong[rank]
    except Exception as error:
        with together(meeting):  # and goes on
            pass
        assert first >= 5 + rank and meeting.acts(0) == 18
        return type(error).__name__, str(error)
    return "", ""


def test_all_ranks_raise_what_the_lowest_failed_one_did(pool: WorkerPool) -> None:
    wrong = {1: StorageError("a: disk full"), 2: CheckpointError("b: wrong")}
    assert pool.run(fail, wrong, world=3) == [("StorageError", "rank 1: a: disk full")] * 3
    assert pool.run(fail, {2: ValueError("x\ny")}, world=3) == [("DistributedError", "rank 2: ValueError: x y")] * 3


def wait_in_vain(rank: int) -> str:
    meeting = Meeting.of_world("test")
    if rank == 0:
        timer = threading.Timer(0.3, meeting.give_up)
        timer.start()
        with pytest.raises(DistributedError, match="given up"):
            meeting.agree(None)  # rank 1 does not come
    dist.barrier()
    return "over"


def test_a_wait_can_be_given_up(pool: WorkerPool) -> None:
    assert pool.run(wait_in_vain, world=2) == ["over"] * 2


def tell(rank: int) -> tuple[list[dict[str, Any]], int]:
    """Return what rank 0 gathered, by a meeting and by the group, and how many values this rank brought to it."""
    meeting = Meeting.of_world("test")
    values = {"all": [1, 2], f"of {rank % 2}": {"half": rank % 2}, **({"one": None} if rank == 1 else {})}
    found = [gather_distinct(values, meeting)]
    brought = sum(key.partition("/value/")[2] in values for keys in meeting._given.values() for key in keys)
    return [*found, gather_distinct(values, dist.group.WORLD), gather_distinct({}, meeting)], brought


def test_values_that_many_ranks_have_are_sent_by_one(pool: WorkerPool) -> None:
    answers = pool.run(tell, world=4)
    everything = {"all": [1, 2], "of 0": {"half": 0}, "of 1": {"half": 1}, "one": None}
    assert sum(brought for _, brought in answers) == len(everything)
    assert [found for found, _ in answers] == [[everything, everything, {}], *[[{}, {}, {}]] * 3]
