"""What benchmarks on several processes share: how these are started, what is noted of the machine, what is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megalm.launch.local import run_workers


def measured_by(program: Path, job: Mapping[str, Any], ranks: int, directory: Path | None = None) -> Any:
    """Return what rank 0 of `ranks` new processes of a program wrote; SystemExit where one fails.

    The program's argument is a file with the job as JSON; its answer, JSON too, goes to `result_of` that. Both lie in
    a directory of their own, below `directory` or the system's place for temporary files.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix="benchmark-") as place:
        path = Path(place) / "job.json"
        path.write_text(json.dumps(job))
        status = run_workers([sys.executable, str(program), str(path)], ranks, None)
        if status:
            raise SystemExit(f"{program.name} on {ranks} ranks: a process ended with status {status}")
        return json.loads(result_of(path).read_text())


def result_of(job_path: Path) -> Path:
    """Return where the result of a job lies."""
    return job_path.with_suffix(".result.json")


def machine() -> dict[str, Any]:
    """Return what figures depend on beside the code: date, versions, processor and GPUs, and how busy it is."""
    gpus = torch.cuda.device_count()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else None,
        "load": round(os.getloadavg()[0], 1),
    }


def write_result(path: Path, before: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a result as JSON, with the machine as it was `before` and how busy it is now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": dict(before), "load_after": round(os.getloadavg()[0], 1)}
    path.write_text(json.dumps({**facts, **result}, indent=1) + "\n")


def _processor() -> str:
    """Return the CPU's name as far as the system tells it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
