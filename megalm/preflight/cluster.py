"""Which node of a launched world is slow, broken or other than the rest: pure judgement of what all have measured.

No torch and no process group: `world.py` measures and gathers, `report.py` shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megalm.preflight.finding import Finding, Level, worst
from megalm.preflight.judge import NEAREST, majority, slower_than_peers

# Positions of two nodes -> (latency in seconds, bytes a second).
Links = Mapping[tuple[int, int], tuple[float, float]]
# The same for each pair of ranks, the n-th ones of both nodes, that measured at the same time; a node's is their mean.
RankLinks = Mapping[tuple[int, int], Sequence[tuple[float, float]]]
# A node's position -> (seconds ahead of the first node, uncertainty in seconds).
Skews = Mapping[int, tuple[float, float]]

SKEW_WARN_S, SKEW_FAIL_S = 0.1, 1.0
_DISK_SHARE = 0.2  # a shared disk serves its writers unevenly
_LATENCY_SHARE, _LATENCY_SLACK_S = 1 / 3, 0.5e-3
_PAIR_SHARE = 0.4
_CPU_SHARE = 0.5  # CPUs have other work besides; what is measured on them varies more than a GPU
# What a pair of two nodes, which have no peers to be compared with, must reach: 1 Gb/s Ethernet; NCCL's fabric.
_LEAST_BYTES_PER_S = {"cpu": 0.08e9, "cuda": 1e9}
_MOST_LATENCY_S = 5e-3


@dataclass(frozen=True)
class Node:
    """One machine: its ranks, what its checks found, and the figures that nodes are compared by."""

    name: str
    ranks: tuple[int, ...]
    findings: tuple[Finding, ...]
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """Return the worst level of its findings."""
        return worst(self.findings)


@dataclass(frozen=True)
class Cluster:
    """All nodes, judged; `findings` are of the whole, such as a pair of nodes that cannot be told apart."""

    nodes: tuple[Node, ...]
    findings: tuple[Finding, ...] = ()
    all_reduce: Mapping[int, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """Return the names of the nodes to exclude."""
        return [node.name for node in self.nodes if node.level == "fail"]

    @property
    def level(self) -> Level:
        """Return the worst level of all findings."""
        return worst([finding for node in self.nodes for finding in node.findings] + list(self.findings))


def nodes_of(reports: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Join the reports of ranks ({"node", "findings"}, in the order of ranks) to nodes, in the order of first ranks.

    Where every rank runs a check, a finding names the rank; a node's product speed is that of its slowest rank.
    """
    names = list(dict.fromkeys(report["node"] for report in reports))
    ranks = {name: [rank for rank, report in enumerate(reports) if report["node"] == name] for name in names}
    nodes = []
    for name in names:
        findings: list[Finding] = []
        rates: dict[int, float] = {}
        values: dict[str, Any] = {}
        for rank in ranks[name]:
            for finding in (Finding.from_json(value) for value in reports[rank]["findings"]):
                if "gflops" in finding.values:
                    rates[rank] = min(rates.get(rank, float("inf")), finding.values["gflops"])
                values |= {key: value for key, value in finding.values.items() if key not in values}
                if finding.level != "ok" and finding not in findings:
                    findings.append(finding)
        values["rates"] = rates
        nodes.append(Node(name, tuple(ranks[name]), tuple(findings), values))
    return nodes


def judge(
    nodes: Sequence[Node],
    rank_links: RankLinks,
    skews: Skews,
    all_reduce: Mapping[int, float] | None = None,
    device: str = "cpu",
    witness: Sequence[Finding] = (),
) -> Cluster:
    """Return the nodes with all that comparing them adds. `rank_links` and `skews` may be empty."""
    links = {
        pair: (statistics.median_low([latency for latency, _ in some]), statistics.fmean(rate for _, rate in some))
        for pair, some in rank_links.items()
    }
    added: list[list[Finding]] = [[] for _ in nodes]
    _compare_versions(nodes, added)
    _compare_gpus(nodes, added)
    _compare_mounts(nodes, added)
    _compare_speeds(nodes, device, added)
    _compare_clocks(skews, added)
    whole = _compare_links([node.name for node in nodes], links, device, added)
    _compare_rank_links(nodes, rank_links, device, added)
    judged = []
    for position, node in enumerate(nodes):
        values = dict(node.values)
        own = [link for pair, link in links.items() if position in pair]
        if own:
            values["latency_s"] = statistics.median_low([latency for latency, _ in own])
            values["bytes_per_s"] = statistics.median_high([rate for _, rate in own])
        if position in skews:
            values["offset_s"] = skews[position][0]
        judged.append(replace(node, findings=(*node.findings, *added[position]), values=values))
    return Cluster(tuple(judged), (*whole, *witness), all_reduce or {})


def odd_versions(tables: Sequence[Mapping[str, str]]) -> dict[int, list[str]]:
    """Return {position: what differs from most of the others} for tables of versions by package.

    Where no value is the commonest, the first table's counts as the right one.
    """
    odd: dict[int, list[str]] = {}
    for name in sorted({name for table in tables for name in table}):
        found = {position: str(table.get(name, "not installed")) for position, table in enumerate(tables)}
        usual = majority(found, 0)
        for position, version in found.items():
            if version != usual:
                odd.setdefault(position, []).append(f"{name} {version} where others have {usual}")
    return odd


def _compare_versions(nodes: Sequence[Node], added: list[list[Finding]]) -> None:
    tables = [{**node.values.get("versions", {}), **_build(node)} for node in nodes]
    for position, differences in odd_versions(tables).items():
        remedy = "install the same environment on all nodes, or share one over the network"
        added[position].append(Finding("versions", "fail", "; ".join(differences), remedy))
    drivers = {p: str(node.values["driver"]) for p, node in enumerate(nodes) if node.values.get("driver")}
    usual = majority(drivers, min(drivers)) if drivers else ""
    for position, driver in drivers.items():
        if driver != usual:
            text = f"driver {driver} where others have {usual}"
            added[position].append(Finding("versions", "warn", text, "install the same driver on all nodes"))


def _build(node: Node) -> dict[str, str]:
    return {key: node.values[key] for key in ("torch_build", "mpi") if key in node.values}


def _compare_gpus(nodes: Sequence[Node], added: list[list[Finding]]) -> None:
    counts = {p: f"{node.values['gpus']} GPUs" for p, node in enumerate(nodes) if "gpus" in node.values}
    usual = majority(counts, min(counts)) if counts else ""
    for position, count in counts.items():
        if count != usual:
            added[position].append(
                Finding("gpus", "fail", f"{count} where others have {usual}", "nvidia-smi; see dmesg")
            )


def _compare_mounts(nodes: Sequence[Node], added: list[list[Finding]]) -> None:
    """Name the nodes that lack the mount on which the others have the run's directory."""
    mounts = {p: str(node.values["disk_mount"]) for p, node in enumerate(nodes) if "disk_mount" in node.values}
    usual = majority(mounts, min(mounts)) if mounts else ""
    for position, mount in mounts.items():
        if mount != usual:
            text = f"the run directory lies on the mount {mount} where others have {usual}"
            added[position].append(Finding("disk", "fail", text, f"mount {usual}; see findmnt and dmesg"))


def _compare_speeds(nodes: Sequence[Node], device: str, added: list[list[Finding]]) -> None:
    rates = {(p, rank): rate for p, node in enumerate(nodes) for rank, rate in node.values.get("rates", {}).items()}
    for (position, rank), share in slower_than_peers(rates, _nearest(device)).items():
        text = f"rank {rank} multiplies matrices at {share:.0%} of the median speed"
        remedy = "other processes on the node, power and temperature: top; nvidia-smi -q -d PERFORMANCE"
        added[position].append(Finding("product", "fail", text, remedy))
    disks = {p: node.values["disk_mb_s"] for p, node in enumerate(nodes) if "disk_mb_s" in node.values}
    for position, share in slower_than_peers(disks, _DISK_SHARE).items():
        text = f"writes to the run directory at {share:.0%} of the median speed ({disks[position]:.1f} MB/s)"
        added[position].append(Finding("disk speed", "fail", text, "see the mount and the disk: mount; dmesg; iostat"))


def _compare_clocks(skews: Skews, added: list[list[Finding]]) -> None:
    if not skews:
        return
    middle = statistics.median_low([offset for offset, _ in skews.values()])
    for position, (offset, error) in skews.items():
        sure = abs(offset - middle) - error
        if sure > SKEW_WARN_S:
            level: Level = "fail" if sure > SKEW_FAIL_S else "warn"
            text = f"its clock is {abs(offset - middle):.3g} s {'ahead of' if offset > middle else 'behind'} the median"
            added[position].append(
                Finding("clock skew", level, text, "chronyc makestep; systemctl enable --now chronyd")
            )


def _compare_links(names: Sequence[str], links: Links, device: str, added: list[list[Finding]]) -> list[Finding]:
    """Attribute slow links to nodes, and return what belongs to a pair alone."""
    if len(names) == 2 and links:
        return list(_lone_pair(names, *next(iter(links.values())), device))
    fast = {pair: rate for pair, (_, rate) in links.items()}
    quick = {pair: 1 / (latency + _LATENCY_SLACK_S) for pair, (latency, _) in links.items()}
    slow_nodes: set[int] = set()
    remedy = "the node's cable, port and interface: ethtool, ibstat, ip -s link; NCCL_SOCKET_IFNAME"
    for what, speeds, nearest in (("bandwidth", fast, _nearest(device)), ("latency", quick, _LATENCY_SHARE)):
        medians = {p: _median_of(p, speeds) for p in range(len(names)) if any(p in pair for pair in speeds)}
        for position in slower_than_peers(medians, nearest):
            slow_nodes.add(position)
            text = f"slow links: {_compared(what, position, links)}"
            added[position].append(Finding("links", "fail", text, remedy))
    found = []
    for pair, share in slower_than_peers(fast, _PAIR_SHARE).items():
        if not slow_nodes & set(pair):
            first, second = (names[position] for position in pair)
            text = f"{first} - {second}: {share:.0%} of the median bandwidth, while each is fast with the others"
            found.append(Finding("links", "warn", text, "the switches between the two"))
    return found


def _compare_rank_links(nodes: Sequence[Node], rank_links: RankLinks, device: str, added: list[list[Finding]]) -> None:
    """Name single ranks whose links are slow, where those of their whole node were not named: one bad network card.

    A rank is held against those in its place on other nodes, as a card may be slower than the others by design.
    """
    if len(nodes) == 2:
        return
    for place in range(max((len(some) for some in rank_links.values()), default=0)):
        rates = {pair: some[place][1] for pair, some in rank_links.items() if place < len(some)}
        medians = {p: _median_of(p, rates) for p in range(len(nodes)) if any(p in pair for pair in rates)}
        for position, share in slower_than_peers(medians, _nearest(device)).items():
            if all(finding.check != "links" for finding in added[position]):
                rank, rate = nodes[position].ranks[place], medians[position] / 1e9
                text = f"slow links of rank {rank}: {rate:.3g} GB/s, {share:.0%} of the median of its place"
                remedy = "the network card next to its GPU: nvidia-smi topo -m; ibstat"
                added[position].append(Finding("links", "fail", text, remedy))


def _nearest(device: str) -> float:
    return NEAREST if device == "cuda" else _CPU_SHARE


def _median_of(position: int, speeds: Mapping[tuple[int, int], float]) -> float:
    """Return a node's median pair; of two middle ones the faster, so that a node is slow when most of its pairs are."""
    return statistics.median_high([speed for pair, speed in speeds.items() if position in pair])


def _compared(what: str, position: int, links: Links) -> str:
    own = [link for pair, link in links.items() if position in pair]
    if what == "bandwidth":
        mine, all_of_them = (statistics.median_high([rate for _, rate in some]) for some in (own, links.values()))
        return f"{mine / 1e9:.3g} GB/s, median of all {all_of_them / 1e9:.3g} GB/s"
    mine, all_of_them = (statistics.median_low([latency for latency, _ in some]) for some in (own, links.values()))
    return f"{mine * 1e6:.0f} us a message, median of all {all_of_them * 1e6:.0f} us"


def _lone_pair(names: Sequence[str], latency_s: float, rate: float, device: str) -> Iterable[Finding]:
    """Judge the only pair of two nodes by what any network of today reaches."""
    both = f"{names[0]} - {names[1]}"
    hint = "with two nodes it cannot be told which; measure with a third. ethtool, ibstat, ip -s link"
    if rate < _LEAST_BYTES_PER_S[device]:
        text = f"{both}: {rate / 1e9:.3g} GB/s, {_LEAST_BYTES_PER_S[device] / 1e9:g} expected of any network"
        yield Finding("links", "fail", text, hint)
    if latency_s > _MOST_LATENCY_S:
        text = f"{both}: {latency_s * 1e3:.3g} ms a message, {_MOST_LATENCY_S * 1e3:g} expected at most"
        yield Finding("links", "fail", text, hint)
