"""What nvidia-smi and rocm-smi print: parsed, and judged."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.preflight import gpus
from megalm.preflight.finding import Place, worst
from megalm.preflight.gpus import FIELDS, Gpu, gpu_findings, nvidia_findings, parse_nvidia, parse_rocm

HEALTHY = (
    "0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 81008, Disabled, Enabled, 0, 0, No, 345, 1980, "
    "0x0000000000000001, 31\n"
    "1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 81008, Disabled, Enabled, 0, 3, No, 1980, 1980, "
    "0x0000000000000004, 64\n"
)
CONSUMER = (
    "0, NVIDIA GeForce RTX 4090, 535.104.05, 24564, 24111, [N/A], Disabled, [N/A], [N/A], [N/A], 210, 3105, "
    "0x0000000000000001, 38\n"
)
MIG = "0, NVIDIA A100-SXM4-80GB, 535.104.05, 81920, 0, Enabled, Enabled, 0, 0, No, 210, 1410, 0x0000000000000001, 29\n"
SICK = (
    "0, NVIDIA A100-SXM4-40GB, 470.57.02, 40536, 40000, Disabled, Enabled, 2, 4711, Yes, 210, 1410, "
    "0x00000000000000C8, 91\n"
    "1, NVIDIA A100-SXM4-40GB, 470.57.02, 40536, [GPU requires reset], Disabled, Enabled, [Unknown Error], "
    "[Unknown Error], [N/A], [N/A], 1410, [Unknown Error], [Unknown Error]\n"
)
GOOD = Gpu(0, "H100", total_bytes=80 * 2**30, free_bytes=79 * 2**30, persistence=True)


def test_healthy_gpus() -> None:
    first, second = parse_nvidia(HEALTHY)
    assert (first.index, first.name, first.driver) == (0, "NVIDIA H100 80GB HBM3", "550.54.15")
    assert (first.total_bytes, first.free_bytes) == (81559 * 2**20, 81008 * 2**20)
    assert (first.clock_mhz, first.max_clock_mhz, second.temperature_c, second.corrected) == (345, 1980, 64, 3)
    assert worst([*gpu_findings(first), *gpu_findings(second)]) == "ok"


def test_fields_that_are_not_available_are_no_fault_and_no_zero() -> None:
    (gpu,) = parse_nvidia(CONSUMER)
    assert (gpu.uncorrected, gpu.corrected, gpu.mig, gpu.retirement_pending) == (None, None, False, False)
    assert [finding.level for finding in gpu_findings(gpu)] == ["warn"]  # persistence alone


def test_mig_is_told_and_its_memory_is_not_blamed_on_others() -> None:
    (finding,) = gpu_findings(parse_nvidia(MIG)[0])
    assert finding.level == "warn"
    assert "MIG" in finding.text and "-mig 0" in finding.remedy


def test_errors_throttling_and_a_lost_gpu_fail() -> None:
    first, second = parse_nvidia(SICK)
    texts = [f"{finding.level} {finding.text}" for finding in gpu_findings(first)]
    assert [text.split(": ", 1)[1] for text in texts] == [
        "2 uncorrected ECC errors",
        "4711 corrected ECC errors",
        "memory pages wait to be retired",
        "slowed down: hardware slowdown, hardware thermal slowdown, power brake at 91 degrees",
    ]
    assert [text.split()[0] for text in texts] == ["fail", "warn", "warn", "fail"]
    assert any("requires reset" in finding.text for finding in gpu_findings(second))
    assert worst(gpu_findings(second)) == "fail"


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"uncorrected": 1}, "fail", "uncorrected"),
        ({"corrected": 999}, "ok", "free"),
        ({"corrected": 1000}, "warn", "corrected"),
        ({"retirement_pending": True}, "warn", "retired"),
        ({"throttle": 0x4}, "ok", "free"),
        ({"throttle": 0x20}, "warn", "thermal"),
        ({"throttle": 0x40}, "fail", "thermal"),
        ({"throttle": 0x80}, "fail", "power brake"),
        ({"free_bytes": 30 * 2**30}, "warn", "another process"),
        ({"free_bytes": None}, "ok", "not told"),
        ({"persistence": False}, "warn", "persistence"),
        ({"lost": "GPU is lost"}, "fail", "lost"),
    ],
)
def test_each_state_of_a_gpu(change: dict[str, object], level: str, words: str) -> None:
    findings = gpu_findings(replace(GOOD, **change))  # type: ignore[arg-type]
    assert worst(findings) == level
    assert words in findings[0].text
    assert level == "ok" or findings[0].remedy


def test_a_gpu_that_does_not_answer_is_missed() -> None:
    findings = nvidia_findings(parse_nvidia(HEALTHY), on_bus=3, device=None)
    assert [finding.text for finding in findings if finding.level == "fail"] == [
        "2 of the 3 NVIDIA GPUs on the PCI bus answer"
    ]
    assert worst(nvidia_findings(parse_nvidia(HEALTHY), on_bus=2, device=None)) == "ok"


def test_a_rank_judges_its_own_gpu_only() -> None:
    healthy, sick = parse_nvidia(HEALTHY)[0], replace(GOOD, index=1, uncorrected=5)
    assert worst(nvidia_findings([healthy, sick], 2, device=0)) == "ok"
    assert worst(nvidia_findings([healthy, sick], 2, device=1)) == "fail"


def test_another_number_of_fields_is_an_error_that_shows_the_line() -> None:
    with pytest.raises(ValueError, match="2 fields instead of 14 in '0, NVIDIA H100'"):
        parse_nvidia("0, NVIDIA H100\n")


def test_rocm() -> None:
    card = {"VRAM Total Memory (B)": "68702699520", "VRAM Total Used Memory (B)": "10960896", "Card Series": "MI210"}
    (gpu,) = parse_rocm(json.dumps({"card0": card, "system": {"Driver version": "6.3.6"}}))
    assert (gpu.index, gpu.name, gpu.total_bytes) == (0, "MI210", 68702699520)
    assert worst(gpu_findings(gpu)) == "ok"
    (full,) = parse_rocm(json.dumps({"card3": {**card, "VRAM Total Used Memory (B)": "60000000000"}}))
    assert worst(gpu_findings(full)) == "warn"


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_an_older_driver_is_asked_by_its_own_names(tmp_path: Path) -> None:
    tool = program(
        tmp_path / "nvidia-smi",
        'case "$1" in *clocks_event_reasons*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        f"printf '{HEALTHY}'",
    )
    assert len(parse_nvidia(gpus.query_nvidia(tool))) == 2
    assert all(name in FIELDS for name in gpus.OLD_NAMES)


def test_a_failing_driver_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver'; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpus, "pci_accelerators", lambda: {"NVIDIA": 8})
    (finding,) = gpus.check_gpus(Place())
    assert finding.level == "fail"
    assert "no driver" in finding.text


@pytest.mark.parametrize(
    ("visible", "index", "expected"), [(None, 2, 2), ("4,5", 1, 5), ("GPU-1234", 0, None), ("3", 1, None)]
)
def test_a_visible_gpu_is_found_among_all(visible: str | None, index: int, expected: int | None) -> None:
    assert gpus._physical(index, visible) == expected
