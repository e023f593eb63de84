"""What every launcher leaves in the environment, whole, partial and contradictory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megalm.distributed.rendezvous import (
    Rendezvous,
    expand_node_list,
    first_host,
    rank_nodes,
    read_environment,
    slurm_port,
)
from megalm.errors import LaunchError

PLAIN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "23456"}
TORCHRUN = {
    **PLAIN,
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
ALLOCATION = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2"}
BATCH_SHELL = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **ALLOCATION,
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def meet(rank: int, world_size: int) -> tuple[str, int]:
    return "host-of-0", 4000 + world_size


def test_nothing_set_means_nobody_started_us():
    assert read_environment({"PATH": "/bin", "RANK": ""}) is None


def test_plain_variables():
    assert read_environment(PLAIN) == Rendezvous(3, 8, 1, None, "node1", 23456, "environment")


def test_torchrun():
    found = read_environment(TORCHRUN)
    assert found == Rendezvous(3, 8, 1, 2, "node1", 23456, "torchrun", agent_store=True, attempt="2")


def test_torchrun_under_srun_has_its_own_world():
    assert read_environment({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_srun():
    assert read_environment(SRUN) == Rendezvous(3, 4, 1, 2, "node3", slurm_port(1234, 1), "srun")


def test_srun_takes_a_given_meeting_point():
    found = read_environment({**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29511"})
    assert (found.address, found.port) == ("10.0.0.7", 29511)


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290", "4294967294"])
def test_the_shell_of_an_allocation_is_no_rank(step):
    environ = BATCH_SHELL if step is None else {**BATCH_SHELL, "SLURM_STEP_ID": step}
    assert read_environment(environ) is None


def test_mpirun():
    assert read_environment(OPEN_MPI, meet) == Rendezvous(1, 2, 1, 2, "host-of-0", 4002, "mpirun")
    assert read_environment(MPICH, meet) == Rendezvous(1, 2, 1, 2, "host-of-0", 4002, "mpirun")


def test_mpirun_with_a_given_meeting_point_needs_no_mpi4py():
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from megalm.distributed.rendezvous import read_environment\n"
        f"print(read_environment({ {**OPEN_MPI, 'MASTER_ADDR': 'a', 'MASTER_PORT': '5000'}!r}).port)\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "5000\n"


def test_mpirun_inside_of_an_allocation_is_mpi_s_world():
    environ = {**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", **OPEN_MPI}  # its daemons are an srun step
    assert read_environment(environ, meet).launcher == "mpirun"


@pytest.mark.parametrize("missing", sorted(PLAIN))
def test_a_partial_environment_names_what_is_missing(missing):
    environ = {name: value for name, value in PLAIN.items() if name != missing}
    with pytest.raises(LaunchError, match=f"set, but {missing} missing; set all of RANK"):
        read_environment(environ)


def test_a_meeting_point_without_a_rank_is_partial():
    with pytest.raises(LaunchError, match="MASTER_ADDR set, but RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT missing"):
        read_environment({"MASTER_ADDR": "x"})


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({**PLAIN, "RANK": "8"}, "rank 8 of 8"),
        ({**PLAIN, "RANK": "-1"}, "RANK=-1 is not a number"),
        ({**PLAIN, "WORLD_SIZE": "four"}, "WORLD_SIZE=four is not a number"),
        ({**PLAIN, "LOCAL_RANK": "4"}, "local rank 4"),
        ({**PLAIN, "LOCAL_WORLD_SIZE": "1"}, "local rank 1 of 1"),
        ({**PLAIN, "LOCAL_WORLD_SIZE": "9"}, "of 9"),
        ({**PLAIN, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({**PLAIN, "MASTER_ADDR": "node1; rm -rf /"}, "neither a host name nor an address"),
        ({**PLAIN, **OPEN_MPI}, "contradicts OMPI_COMM_WORLD_RANK=1 of OMPI_COMM_WORLD_SIZE=2"),
        ({**SRUN, **PLAIN}, "contradicts SLURM_PROCID=3 of SLURM_NTASKS=4"),
        ({**SRUN, "SLURM_NTASKS": "8"}, "SLURM_NTASKS=8 contradicts SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "SLURM_PROCID": "4"}, "rank 4 of 4"),
        ({**SRUN, "SLURM_STEP_NODELIST": "node[3-"}, "malformed"),
        ({**SRUN, "SLURM_STEP_NODELIST": "$(reboot)"}, "neither a host name"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID=2 lies outside"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "not SLURM_PROCID"),
        ({k: v for k, v in SRUN.items() if "NODELIST" not in k}, "not SLURM_STEP_NODELIST"),
        ({**SRUN, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "contradicts SLURM_NTASKS=4"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK missing"),
        ({**OPEN_MPI, "MASTER_PORT": "5000"}, "MASTER_PORT is set alone"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0 is set"),
    ],
)
def test_contradictions_are_errors(environ, reason):
    with pytest.raises(LaunchError, match=reason) as raised:
        read_environment(environ, meet)
    assert "\n" not in str(raised.value) and ";" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7],x", ["node01", "node02", "node03", "node7", "x"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("r[1-2]n[01-02].site", ["r1n01.site", "r1n02.site", "r2n01.site", "r2n02.site"]),
    ],
)
def test_node_lists(text, hosts):
    assert list(expand_node_list(text)) == hosts
    assert first_host(text) == hosts[0]


@pytest.mark.parametrize(
    "text", ["", ",", "a,,b", "a[", "a]", "a[]", "a[1-]", "a[3-1]", "a[x]", "-a", "a b", "a[1,]", "a/b"]
)
def test_malformed_node_lists(text):
    with pytest.raises(LaunchError):
        list(expand_node_list(text))


def test_neighbouring_jobs_and_steps_have_ports_of_their_own_below_the_ephemeral_ones():
    ports = [slurm_port(job, step) for job in range(77_000, 78_000) for step in range(16)]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024 and max(ports) < 32_768


def test_nodes_of_ranks_follow_slurm():
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert rank_nodes(step) == ["node1", "node1", "node2", "node2", "node3"]
    assert rank_nodes({**step, "SLURM_DISTRIBUTION": "block"}) == rank_nodes(step)
    assert rank_nodes({**step, "SLURM_DISTRIBUTION": "cyclic"}) == ["node1", "node2", "node3", "node1", "node2"]
    assert rank_nodes({**step, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}) == []
    assert rank_nodes({}) == []
    assert rank_nodes({**step, "SLURM_STEP_ID": str(0xFFFFFFFB)}) == []
