"""How much of the host's memory may still be taken: by the system's account, and by those of the job's control groups.

A job's control group, which Slurm and container runtimes set, is often a part of the machine; a process that takes
more than the group has is killed. Sources: proc(5), cgroups(7); cgroup-v2.rst and memory.rst of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60
_FILES = {"": ("memory.max", "memory.current", "inactive_file"),
          "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take before the system or a control group kills one."""
    available = int(psutil.virtual_memory().available)
    return min([available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what is left in each control group that this process is in and that has a limit, from the inside out."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in _FILES:
            continue
        limit_file, used_file, cache = _FILES[controllers]
        top = root / "sys/fs/cgroup" / controllers
        inside = top / name.lstrip("/")
        for group in (inside, *inside.parents):
            limit, used = _number(_text(group / limit_file)), _number(_text(group / used_file))
            if limit is not None and used is not None and limit < _UNLIMITED:
                stat = dict(row.split(" ", 1) for row in _text(group / "memory.stat").splitlines() if " " in row)
                yield max(limit - used + (_number(stat.get(cache, "")) or 0), 0)  # such pages are dropped at need
            if group == top:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None
