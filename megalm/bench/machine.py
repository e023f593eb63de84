"""On what a point was measured: host, processor, GPUs.

    python -m megalm.bench.machine FILE

`slurm/scaling.sbatch` calls it on the first node of each point. No torch.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from megalm.answers import counted
from megalm.files import write_durably
from megalm.preflight.finding import Place
from megalm.preflight.gpus import check_gpus
from megalm.preflight.node import node_name

MACHINE_FILE = "machine.json"


def this_machine() -> dict[str, Any]:
    """Return `host`, `processor`, `cores` that this process may use, `gpus`, and where there are some their names."""
    facts: dict[str, Any] = {"host": node_name(), "processor": _processor(), "cores": _cores(), "gpus": 0}
    for finding in check_gpus(Place()):
        facts |= {name: value for name, value in finding.values.items() if value is not None}
    return facts


def describe(facts: dict[str, Any]) -> str:
    """Return the machine in a few words: its GPUs, else its processor."""
    if facts.get("gpus"):
        names = facts.get("gpu_names") or "GPUs"
        driver = f", driver {facts['driver']}" if facts.get("driver") else ""
        return f"{facts['gpus']} x {names} a node{driver}"
    threads = f", {counted(facts['threads_a_rank'], 'thread')} a rank" if "threads_a_rank" in facts else ""
    return f"{facts['cores']} cores of {facts['processor']}{threads}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_machine(path: Path, facts: dict[str, Any]) -> None:
    """Write the facts as JSON, whole or not at all. Raises OSError."""
    write_durably(path, (json.dumps(facts, indent=1) + "\n").encode())


if __name__ == "__main__":
    write_machine(Path(sys.argv[1]), this_machine())
