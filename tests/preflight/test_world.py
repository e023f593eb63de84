"""Ranks of a real process group play nodes; one of them has a fault, and is named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.preflight import report
from megalm.preflight.cluster import Cluster
from megalm.preflight.finding import Check, Finding, Place
from megalm.preflight.network import (
    Link,
    Peer,
    Skew,
    measure_all_reduce,
    measure_clocks,
    measure_link,
    measure_links,
    tournament,
)
from megalm.preflight.storage import check_disk
from megalm.preflight.witness import Witness, reason_to_skip, witness_findings
from megalm.preflight.world import Probes, examine_world, ranks_by_node
from tests.worker_pool import WorkerError, WorkerPool

ALONE = Witness(skipped="not started by mpirun")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


@pytest.mark.parametrize("count", range(1, 18))
def test_each_two_players_meet_once_in_disjoint_pairs(count: int) -> None:
    rounds = list(tournament(count))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    assert len(rounds) == (0 if count == 1 else count - 1 + count % 2)
    for pairs in rounds:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))


def test_the_ranks_of_each_node() -> None:
    assert ranks_by_node(["a", "a", "b", "b", "c"]) == {"a": [0, 1], "b": [2, 3], "c": [4]}
    assert ranks_by_node(["a", "b", "a", "b"]) == {"a": [0, 2], "b": [1, 3]}


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def quick_checks(versions: dict[str, str], gflops: float) -> list[Check]:
    """Return checks that take no time and find what a test wants."""

    def packages(place: Place) -> Iterator[Finding]:
        yield Finding("packages", "ok", "fine", values={"versions": versions})

    def product(place: Place) -> Iterator[Finding]:
        yield Finding("product", "ok", "fine", values={"gflops": gflops})

    return [Check("packages", packages), Check("product", product, every_rank=True), Check("disk", check_disk)]


def steady_link(peer: Peer, leads: bool) -> Link:
    """Exchange one message and return what a healthy network would give, whatever this machine is busy with."""
    message = torch.zeros(1)
    peer.send(message) if leads else peer.receive(message)
    return Link(50e-6, 1e9)


def late_link(peer: Peer, leads: bool) -> Link:
    """Return what is measured of a link that takes 30 ms to send."""
    send = peer.send

    def slowly(tensor: torch.Tensor) -> None:
        time.sleep(0.03)
        send(tensor)

    peer.send = slowly  # type: ignore[method-assign]
    return measure_link(peer, leads)


def examine(rank: int, fault: str, culprit: int, run_dir: str, node_of_rank: list[str]) -> Any:
    """Examine a world in which the node of rank `culprit` has `fault`; return rank 0's cluster as JSON."""
    broken = node_of_rank[rank] == node_of_rank[culprit]
    versions = {**VERSIONS, "torch": "2.12.0"} if fault == "version" and broken else VERSIONS
    gflops = 20.0 if fault == "product" and rank == culprit else 100.0
    probes = Probes(quick_checks(dict(versions), gflops), link=steady_link)
    place = Place(Path(run_dir), needed_bytes=2**62 if fault == "disk" and broken else 1)
    if fault == "clock" and broken:
        probes = replace(probes, clock=lambda: time.time() + 5.0)
    if fault == "link":
        probes = replace(probes, link=late_link if broken else measure_link)
    cluster = examine_world(place, node_of_rank[rank], world(), ALONE, probes)
    assert (cluster is None) == (rank != 0)
    return None if cluster is None else [report.cluster_object(cluster), report.cluster_table(cluster)]


NODES = ["node1", "node2", "node3", "node4"]


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("version", "versions", "torch 2.12.0 where others have 2.13.0"),
        ("product", "product", "rank 2 multiplies matrices at 20% of the median speed"),
        ("disk", "disk", "are needed"),
        ("clock", "clock skew", "its clock is 5 s ahead of the median"),
        ("link", "links", "us a message"),
    ],
)
def test_a_planted_fault_is_named_with_its_node(
    pool: WorkerPool, tmp_path: Path, fault: str, check: str, words: str
) -> None:
    found, table = pool.run(examine, fault, 2, str(tmp_path), NODES, world=4)[0]
    assert found["failed"] == ["node3"], table
    findings = found["nodes"][2]["findings"]
    assert next(finding["check"] for finding in findings if finding["level"] == "fail") == check, table
    assert any(words in finding["text"] for finding in findings), table
    assert table.splitlines()[-1] == "--exclude=node3"


def test_a_healthy_world_names_nobody(pool: WorkerPool, tmp_path: Path) -> None:
    found, table = pool.run(examine, "none", 2, str(tmp_path), NODES, world=4)[0]
    assert found["failed"] == [], table
    assert "--exclude" not in table
    assert {node["level"] for node in found["nodes"]} <= {"ok", "warn"}  # warn: this machine's disk may be slow


def test_several_ranks_of_a_node_are_one_line(pool: WorkerPool, tmp_path: Path) -> None:
    nodes = ["a", "a", "b", "b", "c", "c"]
    found, table = pool.run(examine, "product", 3, str(tmp_path), nodes, world=6)[0]
    assert [node["ranks"] for node in found["nodes"]] == [[0, 1], [2, 3], [4, 5]]
    assert found["failed"] == ["b"]
    assert "rank 3 multiplies" in table


def links_and_sums(rank: int) -> Any:
    peer = Peer(1 - rank, world(), torch.device("cpu"))
    return measure_link(peer, rank == 0), measure_all_reduce(world(), torch.device("cpu"))


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_links_and_collectives_are_measured(pool: WorkerPool) -> None:
    (link, first), (_, second) = pool.run(links_and_sums, world=2)
    assert 0 < link.latency_s < 1
    assert 1e5 < link.bytes_per_s < 1e12
    assert first and first == second  # all ranks judge by the same figures


def links_of_all_ranks(rank: int, nodes: list[list[int]]) -> Any:
    def link(peer: Peer, leads: bool) -> Link:
        return replace(steady_link(peer, leads), bytes_per_s=float(peer.rank))

    found = measure_links(nodes, ["a", "b", "c"], world(), torch.device("cpu"), link)
    return {pair: link.bytes_per_s for pair, link in found.items()}


def test_the_n_th_ranks_of_two_nodes_measure_with_each_other(pool: WorkerPool) -> None:
    found = pool.run(links_of_all_ranks, [[0, 3], [1, 4], [2]], world=5)
    assert found == [{(0, 1): 1.0, (0, 2): 2.0}, {(1, 2): 2.0}, {}, {(0, 1): 4.0}, {}]


def clocks(rank: int, offsets: list[float]) -> dict[int, Skew]:
    return measure_clocks(range(len(offsets)), world(), clock=lambda: time.time() + offsets[rank])


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_clocks_are_measured_to_within_their_error(pool: WorkerPool) -> None:
    offsets = [0.0, 5.0, -0.25]
    first, *others = pool.run(clocks, offsets, world=3)
    assert others == [{}, {}]
    for position, offset in enumerate(offsets):
        assert abs(first[position].offset_s - offset) <= first[position].error_s + 1e-4
        assert first[position].error_s < 0.2


def lose_a_peer(rank: int) -> None:
    peer = Peer(1, world(), torch.device("cpu"), "node2")
    if rank == 0:
        peer.receive(torch.zeros(1))
    else:
        raise SystemExit


def test_a_lost_peer_is_named(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="no message passes between this rank and node2"):
        pool.run(lose_a_peer, world=2)


def test_mpi_is_a_witness_only_where_it_started_the_ranks() -> None:
    assert reason_to_skip({"OMPI_COMM_WORLD_SIZE": "4"}) == ""
    assert reason_to_skip({"PMIX_RANK": "0", "SLURM_STEP_ID": "0"}) == ""
    assert "mpirun" in reason_to_skip({"PMI_SIZE": "4", "SLURM_STEP_ID": "0"})
    assert "mpirun" in reason_to_skip({})


def test_what_mpi_said_is_judged() -> None:
    agreed = [Witness(rank, 2, True, 1e9) for rank in range(2)]
    (fine,) = witness_findings(agreed)
    assert fine.level == "ok" and "2 ranks" in fine.text and "1 GB/s" in fine.text
    (alone,) = witness_findings([Witness(0, 1, True, 1e9)] * 2)
    assert alone.level == "fail" and "rank 1 of 2 for rank 0 of 1" not in alone.text
    assert "rank 0 of 2 for rank 0 of 1" in alone.text
    (wrong,) = witness_findings([agreed[0], replace(agreed[1], right=False)])
    assert wrong.level == "fail" and "wrong on rank 1" in wrong.text
    assert witness_findings([ALONE, ALONE])[0].level == "ok"
    assert witness_findings([ALONE, agreed[1]])[0].level == "warn"


def test_a_cluster_without_links_is_judged_too() -> None:
    assert Cluster(()).level == "ok"
