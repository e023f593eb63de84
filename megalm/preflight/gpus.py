"""What nvidia-smi and rocm-smi say of the GPUs, parsed and judged. No torch.

The parsers and judges are pure functions of text; only the `check_` function at the end starts a program.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalm.preflight.finding import Finding, Level, Place, gib
from megalm.preflight.versions import pci_accelerators

FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.free",
    "mig.mode.current",
    "persistence_mode",
    "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.corrected.volatile.total",
    "retired_pages.pending",
    "clocks.sm",
    "clocks.max.sm",
    "clocks_event_reasons.active",
    "temperature.gpu",
)
# Drivers before 535 know the reasons by this name.
OLD_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
# NVML's bits. Idle, application clocks, a power cap and sync boost are how a healthy GPU works.
_BROKEN = {0x8: "hardware slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
_HOT = {0x20: "software thermal slowdown"}
_UNKNOWN = ("N/A", "[N/A]", "Not Supported", "[Not Supported]", "[Not Found]", "Not Active", "")
_LOST = ("Unknown Error", "GPU requires reset", "GPU is lost", "Insufficient Permissions")
_FREE_SHARE = 0.9
_MANY_CORRECTED = 1000


@dataclass(frozen=True)
class Gpu:
    """One GPU; None where the tool does not tell. Memory in bytes, clocks in MHz, temperature in degrees Celsius."""

    index: int
    name: str
    driver: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    mig: bool = False
    persistence: bool | None = None
    uncorrected: int | None = None
    corrected: int | None = None
    retirement_pending: bool = False
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    throttle: int = 0
    temperature_c: int | None = None
    lost: str = ""


def parse_nvidia(text: str) -> list[Gpu]:
    """Return the GPUs in nvidia-smi's answer to --query-gpu=FIELDS --format=csv,noheader,nounits.

    Raises ValueError, with the line, for one that has another number of fields.
    """
    gpus = []
    for row in csv.reader(text.strip().splitlines(), skipinitialspace=True):
        if len(row) != len(FIELDS):
            raise ValueError(f"nvidia-smi: {len(row)} fields instead of {len(FIELDS)} in {', '.join(row)[:120]!r}")
        said = dict(zip(FIELDS, (word.strip() for word in row), strict=True))
        lost = next((word for word in said.values() if word.strip("[]") in _LOST), "")
        total, free = _integer(said["memory.total"]), _integer(said["memory.free"])
        reasons = said["clocks_event_reasons.active"]
        gpus.append(
            Gpu(
                index=_integer(said["index"]) or 0,
                name=said["name"],
                driver=said["driver_version"] or None,
                total_bytes=None if total is None else total * 2**20,
                free_bytes=None if free is None else free * 2**20,
                mig=said["mig.mode.current"] == "Enabled",
                persistence={"Enabled": True, "Disabled": False}.get(said["persistence_mode"]),
                uncorrected=_integer(said["ecc.errors.uncorrected.volatile.total"]),
                corrected=_integer(said["ecc.errors.corrected.volatile.total"]),
                retirement_pending=said["retired_pages.pending"] == "Yes",
                clock_mhz=_integer(said["clocks.sm"]),
                max_clock_mhz=_integer(said["clocks.max.sm"]),
                throttle=int(reasons, 16) if reasons.startswith("0x") else 0,
                temperature_c=_integer(said["temperature.gpu"]),
                lost=lost.strip("[]"),
            )
        )
    return gpus


def parse_rocm(text: str) -> list[Gpu]:
    """Return the GPUs in the answer of `rocm-smi --showmeminfo vram --showproductname --json`."""
    gpus = []
    for name, card in sorted(json.loads(text).items()):
        if name.startswith("card") and name[4:].isdigit():
            total = _integer(card.get("VRAM Total Memory (B)", ""))
            used = _integer(card.get("VRAM Total Used Memory (B)", ""))
            series = card.get("Card Series") or card.get("Card series") or "AMD GPU"
            free = None if total is None or used is None else total - used
            gpus.append(Gpu(int(name[4:]), series, total_bytes=total, free_bytes=free))
    return gpus


def _integer(word: str) -> int | None:
    return int(word) if word.strip().isdecimal() else None


def gpu_findings(gpu: Gpu) -> list[Finding]:
    """Judge one GPU: one finding for each thing that is wrong, or one that all is well."""
    who = f"GPU {gpu.index} ({gpu.name})"
    bad = [Finding("gpu", level, f"{who}: {text}", remedy) for level, text, remedy in _faults(gpu)]
    if bad:
        return bad
    memory = "memory not told" if gpu.free_bytes is None or gpu.total_bytes is None else (
        f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
    )  # fmt: skip
    clock = "" if gpu.max_clock_mhz is None else f", clock up to {gpu.max_clock_mhz} MHz"
    return [Finding("gpu", "ok", f"{who}: {memory}{clock}")]


def _faults(gpu: Gpu) -> Iterator[tuple[Level, str, str]]:
    reset = f"nvidia-smi --gpu-reset -i {gpu.index}  # or restart the node"
    if gpu.lost:
        yield "fail", f"it answers {gpu.lost!r}", reset
    if gpu.uncorrected:
        yield "fail", f"{gpu.uncorrected} uncorrected ECC errors", reset
    if gpu.corrected is not None and gpu.corrected >= _MANY_CORRECTED:
        yield "warn", f"{gpu.corrected} corrected ECC errors", f"nvidia-smi -q -d ECC -i {gpu.index}  # watch it"
    if gpu.retirement_pending:
        yield "warn", "memory pages wait to be retired", reset
    broken = [name for bit, name in _BROKEN.items() if gpu.throttle & bit]
    hot = [name for bit, name in _HOT.items() if gpu.throttle & bit]
    at = "" if gpu.temperature_c is None else f" at {gpu.temperature_c} degrees"
    look = f"nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER -i {gpu.index}  # cooling, power supply"
    if broken or hot:
        yield ("fail" if broken else "warn"), f"slowed down: {', '.join(broken + hot)}{at}", look
    if gpu.mig:
        yield "warn", "split by MIG: a rank gets a slice", f"nvidia-smi -i {gpu.index} -mig 0  # for whole GPUs"
    elif gpu.total_bytes and gpu.free_bytes is not None and gpu.free_bytes < _FREE_SHARE * gpu.total_bytes:
        text = f"only {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free: another process holds the rest"
        yield "warn", text, "nvidia-smi --query-compute-apps=pid,used_memory,name --format=csv"
    if gpu.persistence is False:
        yield "warn", "persistence mode is off: each start takes seconds", f"nvidia-smi -i {gpu.index} -pm 1"


def nvidia_findings(gpus: Sequence[Gpu], on_bus: int, device: int | None) -> list[Finding]:
    """Judge the GPUs that nvidia-smi lists against the number on the PCI bus; `device`: only this one's state.

    Several drivers cannot be loaded at once, so that of the first GPU stands for all.
    """
    findings = []
    if device is None and on_bus > len(gpus):
        text = f"{len(gpus)} of the {on_bus} NVIDIA GPUs on the PCI bus answer"
        findings.append(Finding("gpu", "fail", text, "dmesg | grep -i -e nvrm -e xid; restart the node"))
    for gpu in gpus:
        if device is None or gpu.index == device:
            findings += gpu_findings(gpu)
    driver = gpus[0].driver if gpus else None
    names = sorted({gpu.name for gpu in gpus})
    values = {"gpus": len(gpus), "gpu_names": ", ".join(names), "driver": driver}
    return [Finding("gpus", "ok", f"{len(gpus)} x {', '.join(names)}, driver {driver}", values=values), *findings]


def query_nvidia(program: str) -> str:
    """Return nvidia-smi's answer, by the older names of fields where it knows only those. RuntimeError if it fails."""
    answer = None
    for names in (FIELDS, tuple(OLD_NAMES.get(name, name) for name in FIELDS)):
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
        if answer.returncode == 0:
            return answer.stdout
    assert answer is not None
    raise RuntimeError(" ".join((answer.stdout + answer.stderr).split())[:200] or f"status {answer.returncode}")


def check_gpus(place: Place) -> Iterator[Finding]:
    """The GPUs' presence, memory, ECC errors, throttling, persistence and clocks."""
    on_bus = pci_accelerators()
    nvidia, rocm = shutil.which("nvidia-smi"), shutil.which("rocm-smi")
    # rocm-smi and nvidia-smi number all GPUs; ranks under CUDA_VISIBLE_DEVICES number what they see.
    device = None if place.device is None else _physical(place.device, place.environ.get("CUDA_VISIBLE_DEVICES"))
    if nvidia:
        try:
            yield from nvidia_findings(parse_nvidia(query_nvidia(nvidia)), on_bus.get("NVIDIA", 0), device)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            level: Level = "fail" if on_bus.get("NVIDIA") else "warn"
            yield Finding("gpu", level, f"nvidia-smi fails: {error}", "load or update the driver; see dmesg")
    elif rocm:
        command = [rocm, "--showmeminfo", "vram", "--showproductname", "--json"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        gpus = parse_rocm(answer.stdout)
        yield Finding("gpus", "ok", f"{len(gpus)} AMD GPUs", values={"gpus": len(gpus)})
        for gpu in gpus:
            yield from gpu_findings(gpu)
    elif on_bus:
        counts = ", ".join(f"{count} {maker}" for maker, count in on_bus.items())
        yield Finding(
            "gpu", "fail", f"{counts} GPUs on the PCI bus, but no nvidia-smi or rocm-smi", "install the driver"
        )
    else:
        yield Finding("gpus", "ok", "none; megalm computes on the CPU", values={"gpus": 0})


def _physical(index: int, visible: str | None) -> int | None:
    """Return which GPU of the machine is this process's number `index`; None where it is named by UUID."""
    if visible is None:
        return index
    names = visible.split(",")
    return int(names[index]) if index < len(names) and names[index].strip().isdecimal() else None
