"""The memory that is left: the least of the system's and of each control group's account."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from megalm.distributed.host_memory import free_host_bytes

MIB = 1 << 20
VERSIONS = {
    2: ("0::/job/step\n", "", ("memory.max", "memory.current", "inactive_file")),
    1: (
        "5:cpu:/\n4:memory:/job/step\n0::/\n",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
}


def write(root: Path, version: int, group: str, limit: str, used: int, cache: int) -> None:
    """Write one control group's files below a root of its own."""
    own, controller, (limit_file, used_file, cached) = VERSIONS[version]
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(own)
    directory = root / "sys/fs/cgroup" / controller / group
    directory.mkdir(parents=True, exist_ok=True)
    (directory / limit_file).write_text(f"{limit}\n")
    (directory / used_file).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{cached} {cache}\nlast 7\n")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_narrowest_group_counts_and_pages_that_can_be_dropped_do_not(tmp_path: Path, version: int) -> None:
    write(tmp_path, version, "job/step", "max" if version == 2 else str(2**63 - 4096), 7 * MIB, 0)
    assert free_host_bytes(tmp_path) > 100 * MIB
    write(tmp_path, version, "job", str(12 * MIB), 9 * MIB, 2 * MIB)
    assert free_host_bytes(tmp_path) == 5 * MIB
    write(tmp_path, version, "job/step", str(8 * MIB), 7 * MIB, 0)
    assert free_host_bytes(tmp_path) == MIB
    write(tmp_path, version, "", str(4 * MIB), 5 * MIB, 0)
    assert free_host_bytes(tmp_path) == 0


def test_without_groups_the_system_s_account_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 123}))
    assert free_host_bytes(tmp_path) == 123
    write(tmp_path, 2, "job/step", "no number", 1, 1)
    assert free_host_bytes(tmp_path) == 123
