"""The judges of one machine's limits, memory, CPUs, environment and disk, and how checks are run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalm.preflight import environment, machine, node, report, speed, storage
from megalm.preflight.finding import Check, Finding, Place, run_check, worst

GIB = 2**30
FINE = {"nofile": 65536, "memlock": machine.UNLIMITED, "nproc": machine.UNLIMITED, "stack": 8 * 2**20}


@pytest.mark.parametrize(
    ("change", "rdma", "level"),
    [
        ({}, True, "ok"),
        ({"nofile": machine.UNLIMITED}, False, "ok"),
        ({"nofile": 4095}, False, "warn"),
        ({"nofile": 1023}, False, "fail"),
        ({"memlock": 65536}, False, "ok"),
        ({"memlock": 65536}, True, "fail"),
        ({"nproc": 1000}, False, "warn"),
        ({"stack": 2**20}, False, "warn"),
        ({"stack": machine.UNLIMITED}, False, "ok"),
    ],
)
def test_limits(change: dict[str, int], rdma: bool, level: str) -> None:
    findings = machine.limit_findings({**FINE, **change}, rdma)
    assert worst(findings) == level
    assert level == "ok" or "ulimit" in findings[0].remedy


def test_shared_memory() -> None:
    assert machine.shm_finding(16 * GIB, 16 * GIB, 8).level == "ok"
    assert machine.shm_finding(2**26, 2**26, 1).level == "warn"
    assert machine.shm_finding(2**26, 2**26, 8).level == "fail"
    assert machine.shm_finding(16 * GIB, 2**20, 1).level == "fail"


def test_cpu_lists() -> None:
    assert machine.cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert machine.cpu_list("\n") == set()


def test_cpus_and_numa_nodes() -> None:
    nodes = {0: range(4), 1: range(4, 8)}
    assert machine.cpu_findings(range(8), nodes, 8)[0].level == "ok"
    assert "wander" in machine.cpu_findings(range(8), nodes, 8)[0].text
    assert machine.cpu_findings(range(4), nodes, 1)[0].text == "4 CPUs on NUMA node 0 of 2"
    few = machine.cpu_findings([0], nodes, 2)[0]
    assert few.level == "warn" and "cpus-per-task" in few.remedy


@pytest.mark.parametrize(
    ("omp", "cpus", "ranks", "level", "remedy"),
    [
        (None, 8, 1, "ok", ""),
        (None, 8, 4, "warn", "export OMP_NUM_THREADS=2"),
        ("2", 8, 4, "ok", ""),
        ("4", 8, 4, "warn", "export OMP_NUM_THREADS=2"),
        ("1", 2, 8, "ok", ""),
        ("0", 2, 1, "warn", "export OMP_NUM_THREADS=2"),
        ("many", 2, 1, "warn", "export OMP_NUM_THREADS=2"),
        ("4,2", 8, 2, "ok", ""),
    ],
)
def test_threads(omp: str | None, cpus: int, ranks: int, level: str, remedy: str) -> None:
    finding = machine.thread_finding(omp, cpus, ranks)
    assert (finding.level, finding.remedy) == (level, remedy)


def test_memory_and_swap() -> None:
    assert machine.memory_findings(60 * GIB, 64 * GIB, 0)[0].level == "ok"
    assert machine.memory_findings(GIB, 64 * GIB, 0)[0].level == "warn"
    assert machine.memory_findings(60 * GIB, 64 * GIB, 2 * GIB)[0].level == "warn"


def test_compilers() -> None:
    assert worst(machine.compiler_findings("/usr/bin/cc", True, True)) == "ok"
    assert worst(machine.compiler_findings(None, True, True)) == "fail"
    assert worst(machine.compiler_findings(None, True, False)) == "warn"
    assert "python3-dev" in machine.compiler_findings("/usr/bin/cc", False, True)[0].remedy


def test_the_kernel_says_whether_the_clock_is_kept() -> None:
    assert machine.clock_finding(0, 0x2001, 1500).text == "synchronized, error at most 1.5 ms"
    assert machine.clock_finding(5, 0, 0).level == "warn"
    assert machine.clock_finding(0, 0x40, 0).level == "warn"
    assert machine.clock_finding(-1, 0, 0).level == "ok"


@pytest.mark.parametrize(
    ("environ", "gpus", "level", "words"),
    [
        ({}, True, "ok", "no contradictions"),
        ({"RANK": "0"}, False, "fail", "WORLD_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            False,
            "ok",
            "no",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            False,
            "fail",
            "rank 2",
        ),
        ({"MASTER_ADDR": "node1"}, False, "fail", "MASTER_ADDR"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, True, "fail", "names no interface of this machine (eth0, eth1, lo)"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, True, "ok", "no"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, True, "fail", "no interface"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, True, "ok", "no"),
        ({"NCCL_SOCKET_IFNAME": "^lo,eth"}, True, "fail", "no interface"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, True, "fail", "no interface"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, True, "ok", "no"),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, "fail", "empty"),
        ({"CUDA_VISIBLE_DEVICES": ""}, False, "warn", "empty"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, True, "ok", "no"),
        ({"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, True, "warn", "contradicts"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, True, "warn", "waited for"),
        ({"TRITON_INTERPRET": "1"}, True, "fail", "interpreter"),
        ({"TRITON_INTERPRET": "1"}, False, "ok", "no"),
    ],
)
def test_variables(environ: dict[str, str], gpus: bool, level: str, words: str) -> None:
    findings = environment.variable_findings(environ, ["lo", "eth0", "eth1"], gpus)
    assert worst(findings) == level
    assert words in findings[0].text
    assert level == "ok" or findings[0].remedy


def test_interfaces() -> None:
    addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"], "down0": []}
    (finding,) = environment.interface_findings(addresses, {"lo": 0, "eth0": 1000, "ib0": 0, "down0": 10})
    assert finding.text == "eth0 1 Gb/s, ib0"
    assert environment.interface_findings(addresses, {"lo": 0})[0].level == "warn"


def test_space_and_inodes() -> None:
    fine = storage.Space(100 * GIB, 200 * GIB, 10**6)
    assert worst(storage.space_findings(Path("/x"), fine, 10 * GIB)) == "ok"
    (full,) = storage.space_findings(Path("/x"), fine, 101 * GIB)
    assert full.level == "fail" and full.text == "100.0 GiB of 200.0 GiB free at /x; 101.0 GiB are needed"
    assert worst(storage.space_findings(Path("/x"), storage.Space(GIB, GIB, 9999), 1)) == "warn"
    assert worst(storage.space_findings(Path("/x"), storage.Space(GIB, GIB, 99), 1)) == "fail"
    assert worst(storage.space_findings(Path("/x"), storage.Space(GIB, GIB, None), 1)) == "ok"


def test_write_speed() -> None:
    assert storage.speed_finding(Path("/x"), 500.0).level == "ok"
    assert storage.speed_finding(Path("/x"), 19.0).level == "warn"


def test_space_counts_what_a_user_may_take() -> None:
    said = SimpleNamespace(f_bavail=10, f_frsize=4096, f_blocks=100, f_favail=5, f_files=50)
    assert storage.space(Path("/x"), lambda path: said) == storage.Space(40960, 409600, 5)  # type: ignore[arg-type, return-value]


def test_the_disk_is_measured_where_the_run_will_be_and_left_as_it_was(tmp_path: Path) -> None:
    findings = list(storage.check_disk(Place(tmp_path / "not/yet/made", needed_bytes=1)))
    assert [finding.check for finding in findings] == ["disk", "disk speed"]
    assert findings[1].values["disk_mb_s"] > 0
    storage.writes(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_does_not_hold_up_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: time.sleep(0.05))
    begin = time.monotonic()
    assert storage.write_speed(tmp_path, size=2**30, limit_s=0.2) < 100  # MB/s: 4 MiB each 50 ms, at most
    assert time.monotonic() - begin < 3


FULL_DISK = """
import sys
from pathlib import Path
from megalm.preflight.finding import Place
from megalm.preflight.storage import check_disk, writes
place = Path(sys.argv[1])
for finding in check_disk(Place(place, needed_bytes=2**30)):
    print(finding.level, finding.text)
(place / "filler").write_bytes(b"x" * (place.stat().st_blksize * 200))
try:
    (place / "more").write_bytes(b"x" * 2**20)
except OSError:
    pass
try:
    writes(place)
    print("written")
except OSError as error:
    print(error.strerror)
"""


def test_a_really_full_disk(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=1m none "$1" && exec "{sys.executable}" -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), FULL_DISK]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    first, last = result.stdout.splitlines()
    assert first.startswith("fail 1.0 MiB of 1.0 MiB free"), result
    assert last == "No space left on device"


def test_products_are_judged_against_the_devices_beside_them() -> None:
    rates = {f"cuda:{n}": 700e3 for n in range(8)} | {"cuda:3": 300e3}
    findings = speed.product_findings(rates, wrong=["cuda:5"])
    assert [f.text.split(":")[1][0] for f in findings if f.level == "fail"] == ["3", "5"]
    assert speed.product_findings({"cpu": 20.0}, [])[0].level == "ok"


def test_a_cpu_multiplies_right_and_a_wrong_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert speed.product_is_exact("cpu")
    assert speed.product_gflops("cpu") > 0
    right = torch.Tensor.__matmul__

    def flipped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = right(a, b)
        if result.dim() == 2:
            result[17, 3] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", flipped)
    assert not speed.product_is_exact("cpu")


def broken(place: Place) -> Iterator[Finding]:
    raise RuntimeError("a\nbad driver")
    yield


def test_an_error_in_a_check_is_a_finding_and_the_others_go_on() -> None:
    fine = Check("fine", lambda place: [Finding("fine", "ok", "good")])
    first, second = node.examine(Place(), checks=[Check("gpus", broken), fine])
    assert (first.check, first.level) == ("gpus", "warn")
    assert "RuntimeError: a bad driver" in first.text
    assert second.text == "good"


def test_a_check_that_hangs_is_given_up() -> None:
    for_ever = threading.Event()
    begin = time.monotonic()
    (finding,) = run_check(Check("disk", lambda place: [for_ever.wait()], limit_s=0.2), Place())  # type: ignore[list-item]
    assert finding.level == "fail" and "no answer within" in finding.text
    assert time.monotonic() - begin < 5
    for_ever.set()


def test_only_checks_of_every_rank_run_on_the_others() -> None:
    checks = [
        Check("node", lambda place: [Finding("node", "ok", "")]),
        Check("rank", lambda place: [Finding("rank", "ok", "")], every_rank=True),
    ]
    assert [finding.check for finding in node.examine(Place(), every_rank_only=True, checks=checks)] == ["rank"]


def test_names_of_checks_differ() -> None:
    names = [check.name for check in node.CHECKS]
    assert len(set(names)) == len(names) > 10


def test_the_table_puts_each_remedy_below_its_finding() -> None:
    findings = [Finding("a", "ok", "fine", "unused"), Finding("bb", "warn", "odd", "do this")]
    assert report.machine_table(findings).splitlines() == [
        "a   ok    fine",
        "bb  warn  odd",
        "          -> do this",
        "",
        "0 failed, 1 warning, 1 ok",
    ]


def test_a_node_has_the_name_of_the_batch_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert node.node_name() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert node.node_name() == os.uname().nodename
