"""Before the first step: what would waste the job is found in a second, on all ranks together, with the node's name."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm import errors
from megalm.config.run import RunConfig
from megalm.distributed.exchange import broadcast_json, gather_json
from megalm.distributed.host_memory import free_host_bytes
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.errors import ConfigError, DistributedError, LaunchError, MegalmError
from megalm.preflight.cluster import SKEW_FAIL_S, odd_versions
from megalm.preflight.finding import gib
from megalm.preflight.network import measure_clocks
from megalm.preflight.node import node_name
from megalm.preflight.storage import checkpoint_bytes, space, writes
from megalm.preflight.versions import installed_version

COMPARED = ("megalm", "torch", "triton", "deepspeed", "numpy", "safetensors", "tokenizers", "pydantic")
_CLOCK_ROUNDS = 4
_KEPT = 2  # checkpoints that must find room: the one that is written, and the one before it


def compared_versions() -> dict[str, str]:
    """Return what must be equal on all ranks."""
    found = {name: installed_version(name) or "not installed" for name in COMPARED}
    return {"python": platform.python_version(), **found}


def free_memory(device: torch.device) -> int:
    """Return the bytes that may still be taken on the device; of the machine's memory for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


@dataclass(frozen=True)
class Probes:
    """What the gate measures with; tests plant faults here."""

    node: Callable[[], str] = node_name
    versions: Callable[[], Mapping[str, str]] = compared_versions
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    clock: Callable[[], float] = time.time
    memory: Callable[[torch.device], int] = free_memory
    write: Callable[[Path], None] = field(default=writes)


def preflight(config: RunConfig, mesh: ParallelMesh, parameters: int, probes: Probes | None = None) -> None:
    """Raise on all ranks, with the node's name, what would stop the run of so many parameters; return if nothing will.

    Every rank of the world calls, once `run.dir` exists. Versions equal on all ranks, room for two checkpoints (less
    what is there), a file written and read back, clocks within a second, memory for the weights. LaunchError and
    ConfigError for what does not heal by itself, DistributedError for a node that another one may replace.
    """
    probes = probes or Probes()
    world = world_group()
    reports = gather_json(_report(config, mesh, parameters, probes), world)
    names = [report["node"] for report in reports]
    players: list[int] = broadcast_json([names.index(name) for name in dict.fromkeys(names)], world)
    skews = measure_clocks(players, world, probes.clock, _CLOCK_ROUNDS)
    verdict = None
    if mesh.rank == 0:
        offsets = {names[players[position]]: (skew.offset_s, skew.error_s) for position, skew in skews.items()}
        verdict = find_fault(config, reports, offsets)
    said = broadcast_json(None if verdict is None else [type(verdict).__name__, str(verdict)], world)
    if said is not None:
        raise getattr(errors, said[0])(said[1])


def _report(config: RunConfig, mesh: ParallelMesh, parameters: int, probes: Probes) -> dict[str, Any]:
    """Return what this rank knows of itself, and the first on its node of the run's directory."""
    experts = sum(count for name, count in config.model.hidden_matrices.items() if ".experts." in name)
    held = parameters - (experts - experts // mesh.layout.expert)
    weights = held * (8 if config.precision == "fp64" else 4 if config.precision == "fp32" else 2)
    report: dict[str, Any] = {
        "node": probes.node(),
        "versions": dict(probes.versions()),
        "device": str(mesh.device),
        "memory": probes.memory(mesh.device),
        "weights": weights // (mesh.layout.tensor * mesh.layout.pipeline),
    }
    if os.environ.get("LOCAL_RANK", "0") == "0":
        run = Path(config.run.dir)
        try:
            kept = sum(path.is_dir() for path in run.glob("checkpoints/step-*"))
            if config.checkpoint.every or config.checkpoint.at_end:
                report["needed"] = max(1, _KEPT - kept) * checkpoint_bytes(config, parameters)
            report["free"] = space(run, probes.statvfs).free_bytes
            probes.write(run)
        except OSError as error:
            report["trouble"] = error.strerror or str(error)
    return report


def find_fault(
    config: RunConfig, reports: Sequence[Mapping[str, Any]], offsets: Mapping[str, tuple[float, float]]
) -> MegalmError | None:
    """Return the gravest fault in the reports of all ranks, in their order; `offsets` are clocks' by node."""
    skip = "run.preflight=false skips this check"
    odd = odd_versions([report["versions"] for report in reports])
    if odd:
        names = list(dict.fromkeys(reports[rank]["node"] for rank in odd))
        first = "; ".join(odd[min(odd)])
        return LaunchError(f"preflight: {_few(names)}: {first}; install the same environment on all nodes, or {skip}")
    run = config.run.dir
    full = [report for report in reports if report.get("free", 0) < report.get("needed", 0)]
    if full and "free" in full[0]:
        names, least = [report["node"] for report in full], min(report["free"] for report in full)
        needed = full[0]["needed"]
        return ConfigError(
            f"preflight: {_few(names)}: {gib(least)} free at run.dir={run}, but the next checkpoints need "
            f"{gib(needed)}; free space, choose another run.dir, or {skip}"
        )
    trouble = {report["node"]: report["trouble"] for report in reports if "trouble" in report}
    if trouble:
        what = next(iter(trouble.values()))
        return DistributedError(
            f"preflight: {_few(list(trouble))}: run.dir={run} cannot be written ({what}); see whether the node has it "
            "mounted"
        )
    middle = statistics.median_low([offset for offset, _ in offsets.values()]) if offsets else 0.0
    wrong = [name for name, (offset, error) in offsets.items() if abs(offset - middle) - error > SKEW_FAIL_S]
    if wrong:
        off_by = offsets[wrong[0]][0] - middle
        return DistributedError(
            f"preflight: {_few(wrong)}: the clock differs from the median of all nodes by {off_by:+.3g} s; "
            f"chronyc makestep on the node, or {skip}"
        )
    return _short_of_memory(reports, skip)


def _short_of_memory(reports: Sequence[Mapping[str, Any]], skip: str) -> MegalmError | None:
    """Return what to say of a rank whose weights alone do not fit; CPU ranks of a node share its memory."""
    for report in reports:
        shares = 1
        if report["device"] == "cpu":
            shares = sum(other["node"] == report["node"] for other in reports)
        if report["memory"] < report["weights"] * shares:
            return DistributedError(
                f"preflight: {report['node']}: {gib(report['memory'])} of memory free on {report['device']}, but the "
                f"weights of {shares} rank{'s' if shares > 1 else ''} take {gib(report['weights'] * shares)}; see "
                f"which process holds it, use a larger parallel.tensor or parallel.pipeline, or {skip}"
            )
    return None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
