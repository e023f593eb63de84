"""Simulated clusters: each planted fault is named, and ordinary noise names nobody."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest

from megalm.preflight import report
from megalm.preflight.cluster import Cluster, judge, nodes_of, odd_versions
from megalm.preflight.finding import Finding

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"}


class Simulated:
    """A cluster of equal nodes with noise of 10%, in which a test then breaks something."""

    def __init__(self, count: int, ranks: int = 2, noise: float = 0.1, seed: int = 0) -> None:
        self.draw, self.noise = random.Random(seed), noise
        self.names = [f"node{number + 1}" for number in range(count)]
        self.reports = [self._report(name, rank == 0) for name in self.names for rank in range(ranks)]
        self.links = {
            pair: (self._about(30e-6), self._about(12e9)) for pair in combinations(range(count), 2)
        }  # fmt: skip
        self.cards = 1  # network cards of a node, each used by one rank
        self.slow_cards: dict[tuple[int, int], float] = {}
        self.skews = {position: (self.draw.gauss(0, 2e-3), 1e-3) for position in range(count)}

    def _about(self, value: float) -> float:
        return value * max(0.5, self.draw.gauss(1.0, self.noise))

    def _report(self, name: str, first: bool) -> dict[str, Any]:
        findings = [Finding("product", "ok", "fine", values={"gflops": self._about(700e3)})]
        if first:
            findings.append(Finding("packages", "ok", "fine", values={"versions": dict(VERSIONS)}))
            findings.append(Finding("disk speed", "ok", "fine", values={"disk_mb_s": self._about(900.0)}))
            findings.append(Finding("disk", "ok", "fine", values={"disk_mount": "/scratch"}))
            findings.append(Finding("gpus", "ok", "fine", values={"gpus": 8, "driver": "550.54"}))
        return {"node": name, "findings": [finding.as_json() for finding in findings]}

    def set(self, rank: int, key: str, value: Any) -> None:
        """Make rank's figure `key` another one."""
        for finding in self.reports[rank]["findings"]:
            if key in finding["values"]:
                finding["values"] = {**finding["values"], key: value}

    def slow_down(self, position: int, bandwidth: float = 1.0, delay_s: float = 0.0) -> None:
        """Slow down all links of a node."""
        for pair, (latency, rate) in self.links.items():
            if position in pair:
                self.links[pair] = (latency + delay_s, rate * bandwidth)

    def judged(self, device: str = "cuda") -> Cluster:
        """Return the verdict."""
        links = {pair: [link] * self.cards for pair, link in self.links.items()}
        for (position, card), factor in self.slow_cards.items():
            for pair in links:
                if position in pair:
                    latency, rate = links[pair][card]
                    links[pair][card] = (latency, rate * factor)
        return judge(nodes_of(self.reports), links, self.skews, {2**20: 1e9}, device)


def faults(cluster: Cluster) -> dict[str, list[str]]:
    """Return the names of checks with warnings and failures by node; "" is the whole."""
    found = {node.name: [f.check for f in node.findings if f.level != "ok"] for node in cluster.nodes}
    found[""] = [finding.check for finding in cluster.findings if finding.level != "ok"]
    return {name: checks for name, checks in found.items() if checks}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_hundred_healthy_clusters_name_nobody(device: str) -> None:
    for seed in range(100):
        count = random.Random(seed).randint(4, 64)
        assert faults(Simulated(count, seed=seed).judged(device)) == {}, (seed, count)


@pytest.mark.parametrize("count", [3, 4, 8, 64])
def test_a_slow_link_is_attributed_to_its_node(count: int) -> None:
    cluster = Simulated(count)
    cluster.slow_down(1, bandwidth=0.2)
    assert faults(cluster.judged()) == {"node2": ["links"]}
    assert cluster.judged().failed == ["node2"]


def test_a_delay_without_loss_of_bandwidth_is_attributed_too() -> None:
    cluster = Simulated(4)
    cluster.slow_down(3, delay_s=10e-3)
    (finding,) = cluster.judged().nodes[3].findings
    assert "us a message" in finding.text
    assert cluster.judged().failed == ["node4"]


def test_two_slow_nodes_of_eight_are_both_named() -> None:
    cluster = Simulated(8)
    cluster.slow_down(2, bandwidth=0.1)
    cluster.slow_down(5, bandwidth=0.1)
    assert cluster.judged().failed == ["node3", "node6"]


def test_one_slow_network_card_of_eight_is_named_by_its_rank() -> None:
    cluster = Simulated(4, ranks=8)
    cluster.cards = 8
    assert faults(cluster.judged()) == {}
    cluster.slow_cards = {(2, 5): 0.4}
    assert faults(cluster.judged()) == {"node3": ["links"]}
    assert cluster.judged().nodes[2].findings[0].text.startswith("slow links of rank 21: ")
    cluster.slow_cards = {(2, card): 0.1 for card in range(8)}
    assert faults(cluster.judged()) == {"node3": ["links"]}, "all of them are the node's: one finding"


def test_a_place_that_is_slower_on_all_nodes_and_a_node_of_fewer_ranks_blame_nobody() -> None:
    cluster = Simulated(6, ranks=8)
    cluster.cards = 8
    cluster.slow_cards = {(position, 0): 0.7 for position in range(6)}
    assert faults(cluster.judged()) == {}
    links = {pair: [link] * (4 if 0 in pair else 8) for pair, link in cluster.links.items()}
    judged = judge(nodes_of(cluster.reports), links, cluster.skews, {}, "cuda")
    assert faults(judged) == {}


def test_one_slow_pair_blames_no_node() -> None:
    cluster = Simulated(8)
    latency, rate = cluster.links[2, 5]
    cluster.links[2, 5] = (latency, rate * 0.1)
    judged = cluster.judged()
    assert faults(judged) == {"": ["links"]}
    assert judged.findings[0].text.startswith("node3 - node6: ")
    assert judged.failed == [] and judged.level == "warn"


@pytest.mark.parametrize(("latency", "rate", "count"), [(30e-6, 12e9, 0), (30e-6, 1e6, 1), (20e-3, 12e9, 1)])
def test_a_lone_pair_is_judged_by_what_any_network_reaches(latency: float, rate: float, count: int) -> None:
    cluster = Simulated(2)
    cluster.links[0, 1] = (latency, rate)
    judged = cluster.judged("cpu")
    texts = [finding.text for finding in judged.findings]
    assert len(texts) == count
    assert all(text.startswith("node1 - node2: ") for text in texts)
    assert judged.level == ("fail" if count else "ok")


def test_a_slow_rank_is_named_with_its_node() -> None:
    cluster = Simulated(4)
    cluster.set(5, "gflops", 200e3)
    judged = cluster.judged()
    assert faults(judged) == {"node3": ["product"]}
    assert "rank 5" in judged.nodes[2].findings[0].text


def test_a_node_without_the_mount_of_the_others_is_named() -> None:
    cluster = Simulated(4)
    cluster.set(4, "disk_mount", "/")
    assert faults(cluster.judged()) == {"node3": ["disk"]}
    assert cluster.judged().failed == ["node3"]


def test_a_slow_disk_is_named() -> None:
    cluster = Simulated(4)
    cluster.set(2, "disk_mb_s", 30.0)
    assert faults(cluster.judged()) == {"node2": ["disk speed"]}


@pytest.mark.parametrize(
    ("offset", "level"), [(0.05, "ok"), (0.5, "warn"), (-0.5, "warn"), (5.0, "fail"), (-5.0, "fail")]
)
def test_a_wrong_clock_is_named(offset: float, level: str) -> None:
    cluster = Simulated(4)
    cluster.skews[2] = (offset, 1e-3)
    assert cluster.judged().nodes[2].level == level
    assert {node.level for node in cluster.judged().nodes if node.name != "node3"} == {"ok"}


def test_the_first_node_is_blamed_for_its_own_clock() -> None:
    cluster = Simulated(4)
    cluster.skews = {0: (0.0, 0.0), 1: (3600.0, 1e-3), 2: (3600.1, 1e-3), 3: (3600.0, 1e-3)}
    assert cluster.judged().failed == ["node1"]


def test_an_uncertain_clock_is_not_blamed() -> None:
    cluster = Simulated(4)
    cluster.skews[2] = (1.5, 1.6)
    assert faults(cluster.judged()) == {}


def test_another_version_is_named_with_what_others_have() -> None:
    cluster = Simulated(4)
    cluster.set(4, "versions", {**VERSIONS, "torch": "2.12.0"})
    judged = cluster.judged()
    assert faults(judged) == {"node3": ["versions"]}
    assert judged.nodes[2].findings[0].text == "torch 2.12.0 where others have 2.13.0"


def test_a_package_that_one_node_lacks_is_named() -> None:
    assert odd_versions([{"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "2"}]) == {
        1: ["b not installed where others have 2"]
    }
    assert odd_versions([{"a": "1"}, {"a": "2"}]) == {1: ["a 2 where others have 1"]}
    assert odd_versions([{"a": "1"}] * 5) == {}


def test_a_missing_gpu_fails_and_another_driver_warns() -> None:
    cluster = Simulated(4)
    cluster.set(2, "gpus", 7)
    cluster.set(6, "driver", "535.1")
    assert faults(cluster.judged()) == {"node2": ["gpus"], "node4": ["versions"]}
    assert cluster.judged().failed == ["node2"]


def test_what_a_node_found_itself_counts() -> None:
    cluster = Simulated(4)
    cluster.reports[6]["findings"].append(Finding("disk", "fail", "no space", "free some").as_json())
    assert cluster.judged().failed == ["node4"]


def test_the_table_names_the_node_and_gives_the_line_to_paste() -> None:
    cluster = Simulated(8)
    cluster.slow_down(2, bandwidth=0.1)
    cluster.set(12, "versions", {**VERSIONS, "torch": "2.12.0"})
    text = report.cluster_table(cluster.judged())
    lines = text.splitlines()
    assert lines[-1] == "--exclude=node3,node7"
    assert [line.split()[0] for line in lines[1:9]] == cluster.names
    assert any(line.startswith("fail  node3: links: slow links: ") for line in lines)
    assert "8 nodes, 16 ranks, 2 failed" in lines


def test_a_large_cluster_shows_conspicuous_nodes_only() -> None:
    cluster = Simulated(64)
    cluster.slow_down(10, bandwidth=0.1)
    text = report.cluster_table(cluster.judged())
    assert "and 63 nodes without findings" in text
    assert len(text.splitlines()) < 12


def test_what_all_nodes_share_is_one_line() -> None:
    cluster = Simulated(4)
    for rank in (0, 2, 4, 6):
        cluster.reports[rank]["findings"].append(Finding("clock", "warn", "not kept", "chronyd").as_json())
    assert report.cluster_table(cluster.judged()).count("all 4 nodes: clock: not kept") == 1


def test_names_cannot_break_the_line_to_paste() -> None:
    assert report.exclude_line(["node1", "a b;rm"]) == "'--exclude=node1,a b;rm'"


def test_the_object_says_the_same() -> None:
    cluster = Simulated(4)
    cluster.slow_down(1, bandwidth=0.1)
    found = report.cluster_object(cluster.judged())
    assert (found["level"], found["failed"], found["exclude"]) == ("fail", ["node2"], "--exclude=node2")
    assert found["nodes"][1]["findings"][0]["check"] == "links"
