"""Packages against their ranges, torch against the hardware, and which apex it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.preflight.finding import Place, worst
from megalm.preflight.versions import (
    TorchBuild,
    accelerators,
    apex_finding,
    check_apex,
    check_mpi,
    check_python,
    mpi_finding,
    package_findings,
    python_finding,
    torch_findings,
)

CUDA = TorchBuild("2.13.0+cu130", cuda="13.0", devices=8)
CPU = TorchBuild("2.13.0+cpu")
FUSED_ADAM = "import torch\nprint('imported!')\nclass FusedAdam(torch.optim.Optimizer):\n    pass\n"
FUSED_NORM = "class FusedLayerNorm:\n    pass\n"


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 12, 4), "ok"), ((3, 13, 0), "warn")]
)
def test_python_versions(version: tuple[int, ...], level: str) -> None:
    assert python_finding(version).level == level


def test_packages_outside_of_their_range_or_missing_fail_with_the_command_to_paste() -> None:
    installed = {"torch": "2.10.1", "numpy": "2.4.6", "mpi4py": "3.1.4"}
    requirements = [
        "torch<2.14,>=2.11",
        "numpy>=1.26",
        "deepspeed==0.19.8",
        'mpi4py>=4; extra == "mpi"',
        'pytest>=8; extra == "dev"',
        'colorama; platform_system == "Windows"',
    ]
    first, *faults = package_findings(requirements, installed.get)
    assert first.values["versions"] == installed
    assert [(finding.level, finding.text) for finding in faults] == [
        ("fail", "torch 2.10.1 is outside of <2.14,>=2.11"),
        ("fail", "deepspeed is not installed"),
        ("fail", "mpi4py 3.1.4 is outside of >=4"),
    ]
    assert faults[0].remedy == "pip install 'torch<2.14,>=2.11'"


def test_a_local_build_and_an_extra_that_is_not_there_are_fine() -> None:
    findings = package_findings(["torch<2.14,>=2.11", 'mpi4py>=4; extra == "mpi"'], {"torch": "2.13.0+cpu"}.get)
    assert worst(findings) == "ok"


def test_this_environment_is_as_setup_requires() -> None:
    findings = list(check_python(Place()))
    assert worst(findings) == "ok", findings
    assert {"python", "megalm", "torch", "deepspeed"} <= findings[1].values["versions"].keys()


@pytest.mark.parametrize(
    ("build", "hardware", "hidden", "level", "words"),
    [
        (CPU, {}, False, "ok", "CPU build"),
        (CPU, {"NVIDIA": 8}, False, "fail", "8 NVIDIA GPUs"),
        (CPU, {"NVIDIA": 8}, True, "fail", "8 NVIDIA GPUs"),
        (CPU, {"AMD": 4}, False, "fail", "4 AMD GPUs"),
        (CUDA, {"NVIDIA": 8}, False, "ok", "CUDA 13.0"),
        (CUDA, {}, False, "ok", "CUDA 13.0"),
        (TorchBuild("2.13.0+cu130", cuda="13.0"), {"NVIDIA": 8}, False, "fail", "no usable driver"),
        (TorchBuild("2.13.0+cu130", cuda="13.0"), {"NVIDIA": 8}, True, "ok", "0 GPUs"),
        (TorchBuild("2.13.0+rocm7", hip="7.0", devices=4), {"AMD": 4}, False, "ok", "ROCm 7.0"),
        (TorchBuild("2.13.0+cu130", cuda="13.0"), {"AMD": 4}, False, "fail", "4 AMD GPUs"),
        (TorchBuild(error="OSError: libcudart.so.13"), {}, False, "fail", "libcudart"),
    ],
)
def test_torch_against_the_hardware(
    build: TorchBuild, hardware: dict[str, int], hidden: bool, level: str, words: str
) -> None:
    (finding,) = torch_findings(build, hardware, hidden)
    assert finding.level == level
    assert words in finding.text
    assert level == "ok" or finding.remedy


def test_gpus_are_counted_on_the_bus_and_a_display_is_none_of_amd() -> None:
    devices = [("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x1002", "0x030000")]
    devices += [("0x1002", "0x120000"), ("0x1002", "0x038000"), ("0x8086", "0x030000")]
    assert accelerators(devices) == {"NVIDIA": 2, "AMD": 2}


def make_apex(folder: Path, adam: str = FUSED_ADAM, norm: str = FUSED_NORM) -> Path:
    for name, source in (("optimizers/fused_adam.py", adam), ("normalization/fused_layer_norm.py", norm)):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(source)
    return folder


def test_genuine_apex_is_known_by_what_it_defines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apex_finding(make_apex(tmp_path / "apex"), lambda name: True).level == "ok"
    assert apex_finding(None, lambda name: True).level == "ok"
    assert capsys.readouterr().out == ""  # nothing of it ran


def test_a_foreign_apex_and_one_without_its_extensions_are_told_apart(tmp_path: Path) -> None:
    foreign = apex_finding(tmp_path, lambda name: True)
    assert (foreign.level, foreign.remedy) == ("warn", "pip uninstall apex")
    assert "no FusedAdam and no FusedLayerNorm" in foreign.text
    half = apex_finding(make_apex(tmp_path / "half"), lambda name: name != "amp_C")
    assert half.level == "warn" and half.text == "NVIDIA apex without its compiled amp_C"
    broken = apex_finding(make_apex(tmp_path / "broken", adam="class FusedAdam(:\n"), lambda name: True)
    assert "no FusedAdam" in broken.text


def test_a_foreign_apex_on_the_path_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = check_apex(Place())
    assert finding.level == "warn"
    assert "another program" in finding.text


def test_mpi() -> None:
    assert mpi_finding(None, "", "").level == "ok"
    assert mpi_finding("4.1.2", "Open MPI v5.0.11\n", "").text == "mpi4py 4.1.2 on Open MPI v5.0.11"
    lost = mpi_finding("4.1.2", "", "Traceback\nRuntimeError: cannot load MPI library")
    assert lost.level == "warn" and "cannot load MPI library" in lost.text


def test_mpi_is_asked_without_what_a_launcher_left() -> None:
    (finding,) = check_mpi(Place(environ={"PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "PATH": "/usr/bin"}))
    assert finding.check == "mpi"
    assert "hangs" not in finding.text
