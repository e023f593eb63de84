"""A node with a fault is named before it costs a run: by `slurm/preflight.sbatch`, and by the gate of every run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalm.launch.records import read_record
from tests.slurm.cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
FOUR_NODES = ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=1")
OLD_NUMPY = "numpy 1.0.1 where others have"


@pytest.fixture
def nodes(cluster: Cluster) -> list[str]:
    """Give four nodes that are idle, as their names are needed before the job."""
    return cluster.ask("sinfo", "--noheader", "--states=idle", "--Node", "--partition=batch", "--format=%N").split()[:4]


def examined(cluster: Cluster, place: Path, nodes: list[str], *words: str, **more: str) -> Job:
    options = [*FOUR_NODES, f"--nodelist={','.join(nodes)}"]
    job = cluster.submit("preflight", place, "none", options, f"--run-dir={place / 'shared'}", *words, **more)
    job.finish()
    return job


@contextmanager
def slow_link(cluster: Cluster, node: str) -> Iterator[None]:
    """Let what is sent to a node come at 20 Mbit/s."""
    shape = ["tbf", "rate", "20mbit", "burst", "16kb", "latency", "200ms"]
    cluster.ask("tc", "qdisc", "add", "dev", cluster.cable(node), "root", *shape)
    try:
        yield
    finally:
        cluster.ask("tc", "qdisc", "del", "dev", cluster.cable(node), "root")


@contextmanager
def full_disk(cluster: Cluster, node: str, directory: Path) -> Iterator[None]:
    """Let a node see a disk of 1 MB where the others see the directory."""
    cluster.inside(node, "mount", "-t", "tmpfs", "-o", "size=1m", "small", str(directory))
    try:
        yield
    finally:
        cluster.inside(node, "umount", str(directory))


def test_healthy_nodes_pass_with_a_table(cluster: Cluster, place: Path, nodes: list[str]) -> None:
    (place / "shared").mkdir(exist_ok=True)
    job = examined(cluster, place, nodes, MEGALM_MPI="pmix")
    assert job.facts("%T") == "COMPLETED", job.everything()
    if importlib.util.find_spec("mpi4py") is not None:
        assert "mpi: mpi4py agrees: 4 ranks, the sum is right" in job.said(), job.everything()
    assert "4 nodes, 4 ranks, 0 failed" in job.said() and "--exclude" not in job.said(), job.everything()
    for node in nodes:
        assert f"\n{node} " in job.said(), job.everything()


def test_a_slow_link_an_old_library_and_a_full_disk_are_named(cluster: Cluster, place: Path, nodes: list[str]) -> None:
    """Three faults on three of four nodes, each named with its own node and nothing else."""
    (place / "shared").mkdir(exist_ok=True)
    slow, old, full, _ = nodes
    with slow_link(cluster, slow), full_disk(cluster, full, place / "shared"):
        job = examined(cluster, place, nodes, "--exclude-file=excluded", MEGALM_TEST_OLD_NUMPY=old)
    assert job.facts("%T") == "FAILED", job.everything()
    said = [line for line in job.said().splitlines() if line.startswith("fail")]
    for node, what in ((slow, "links: slow links"), (old, "numpy 1.0.1"), (full, "disk")):
        mine = [line for line in said if f" {node}: " in line]
        assert mine and all(what in line for line in mine), job.everything()
    assert "4 nodes, 4 ranks, 3 failed" in job.said(), job.everything()
    assert sorted((place / "excluded").read_text().split()) == sorted((slow, old, full))
    assert "\n--exclude=node" in job.said(), job.everything()


def test_a_node_whose_ranks_never_come_is_named(cluster: Cluster, place: Path, nodes: list[str]) -> None:
    job = examined(cluster, place, nodes, "--start-timeout=20", MEGALM_TEST_ABSENT=nodes[2])
    assert job.facts("%T") == "FAILED", job.everything()
    assert f"--exclude={nodes[2]}" in job.said(), job.everything()


def test_a_run_does_not_start_with_an_odd_library(cluster: Cluster, place: Path, nodes: list[str]) -> None:
    options = [*FOUR_NODES, f"--nodelist={','.join(nodes)}"]
    job = cluster.pretrain(place, "odd", options, "parallel.tensor=2", MEGALM_TEST_OLD_NUMPY=nodes[1])
    assert job.finish() == "FAILED", job.everything()
    assert job.steps() == []
    assert f"preflight: {nodes[1]}: {OLD_NUMPY}" in job.said(), job.everything()


def test_a_job_stays_away_from_the_nodes_that_its_preflight_failed(
    cluster: Cluster, place: Path, nodes: list[str]
) -> None:
    """The nodes that are idle first get the preflight; one of two has an old library."""
    size = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--exclude=node12", "--preflight", "--json"]
    recipe = ["recipe.yaml", "run.dir=examined", "run.device=cpu", "parallel.tensor=2", "train.stop_at=5"]
    command = [sys.executable, "-m", "megalm", "launch", "slurm", *recipe, *size]
    found = json.loads(cluster.ask(*command, cwd=place, MEGALM_TEST_OLD_NUMPY=nodes[1]))
    job = Job(cluster, place, "examined", found["job_id"])
    assert job.finish() == "COMPLETED", job.everything()
    record = read_record(place / "examined/jobs/0001")
    assert record.excluded == f"node12,{nodes[1]}", record
    assert nodes[1] not in job.nodes() and job.steps() == [1, 2, 3, 4, 5]
    (said,) = (place / "examined/jobs/0001").glob(f"job-{record.preflight_job}.log")
    assert f"preflight: {nodes[1]} excluded from job {job.job_id}" in said.read_text()
