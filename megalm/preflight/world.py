"""The ranks of a launched world examine their nodes and the network between them, and rank 0 judges.

`cluster.py` holds the judgement, `network.py` the measurements, `node.py` the checks of one machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalm.distributed.exchange import broadcast_json, gather_json
from megalm.preflight import node
from megalm.preflight.cluster import Cluster, judge, nodes_of
from megalm.preflight.finding import Check, Finding, Place
from megalm.preflight.network import Link, Peer, measure_all_reduce, measure_clocks, measure_link, measure_links
from megalm.preflight.witness import Witness, witness_findings

_NCCL_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Probes:
    """What measures; tests plant faults here."""

    checks: Sequence[Check] = node.CHECKS
    clock: Callable[[], float] = time.time
    link: Callable[[Peer, bool], Link] = measure_link


def ranks_by_node(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the ranks of each node, nodes in the order of their first ranks; `names` are the nodes of the ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    return nodes


def examine_world(
    place: Place, name: str, world: dist.ProcessGroup, witness: Witness, probes: Probes | None = None
) -> Cluster | None:
    """Examine this rank's node, called `name`, and the links; return the judged cluster on rank 0, None elsewhere.

    Every rank of `world` must call; the group needs a CPU back end. With CUDA on all ranks, links and collectives are
    NCCL's and all ranks of a node measure links at once, as each GPU may have a network card; else one of a node. On
    the first rank of each node all checks run, on the others those of their own device.
    """
    probes = probes or Probes()
    names: list[str] = broadcast_json(gather_json(name, world), world)
    rank, nodes = world.rank(), ranks_by_node(names)
    players = [ranks[0] for ranks in nodes.values()]
    place = replace(place, local_ranks=names.count(name))
    findings = _examine(place, rank in players, world, probes.checks)
    skews = measure_clocks(players, world, probes.clock)
    group, device, trouble = _fastest_group(world, place)
    rails = list(nodes.values()) if device.type == "cuda" else [[player] for player in players]
    links = measure_links(rails, list(nodes), group, device, probes.link)
    all_reduce = measure_all_reduce(group, device)
    report = {
        "node": name,
        "findings": [finding.as_json() for finding in findings],
        "links": [[*pair, link.latency_s, link.bytes_per_s] for pair, link in links.items()],
        "witness": asdict(witness),
    }
    reports = gather_json(report, world)
    if rank != 0:
        return None
    measured: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for each in reports:  # the leaders of a pair by rank, hence by their place in the node
        for first, second, latency, rate in each["links"]:
            measured.setdefault((first, second), []).append((latency, rate))
    return judge(
        nodes_of(reports),
        measured,
        {position: (skew.offset_s, skew.error_s) for position, skew in skews.items()} if len(players) > 1 else {},
        all_reduce,
        device.type,
        [*trouble, *witness_findings([Witness(**each["witness"]) for each in reports])],
    )


def _examine(place: Place, is_first: bool, world: dist.ProcessGroup, checks: Sequence[Check]) -> list[Finding]:
    """Run this rank's checks: the products of all ranks at the same time, then the rest."""
    together = [check for check in checks if check.name == "product"]
    rest = [check for check in checks if check.name != "product"]
    node.examine(place, True, together)  # warms up
    dist.barrier(group=world)
    findings = node.examine(place, not is_first, together)
    dist.barrier(group=world)
    return findings + node.examine(place, not is_first, rest)


def _fastest_group(world: dist.ProcessGroup, place: Place) -> tuple[dist.ProcessGroup, torch.device, list[Finding]]:
    """Return the group to measure with: NCCL's where all ranks have a GPU and it works on all of them, else `world`.

    A node without its GPU must not hang the others, so that is agreed on first.
    """
    cpu = torch.device("cpu")
    if not _on_all(place.device is not None, world):
        return world, cpu, []
    assert place.device is not None
    device = torch.device("cuda", place.device)
    error = ""
    try:
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a link that hangs is an error here, not the end of the process
        group: Any = dist.new_group(backend="nccl", timeout=_NCCL_TIMEOUT)
        dist.all_reduce(torch.ones(1, device=device), group=group)
        torch.cuda.synchronize(device)
    except RuntimeError as caught:
        error = " ".join(str(caught).split())[:160]
    if _on_all(not error, world):
        return group, device, []
    text = f"NCCL does not work ({error or 'on another rank'}); links are measured by gloo"
    remedy = "NCCL_DEBUG=INFO says why; NCCL_SOCKET_IFNAME names the interface that joins the nodes"
    return world, cpu, [Finding("nccl", "fail", text, remedy)]


def _on_all(fine: bool, world: dist.ProcessGroup) -> bool:
    flag = torch.tensor([int(fine)])
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=world)
    return bool(flag.item())
