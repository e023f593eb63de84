"""The wheel: it holds all that a user needs, and works without the repository."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("kernels", "ds_configs", "slurm")


def run(command: list[str], cwd: Path) -> str:
    """Run a command away from the repository and return what it wrote to stdout."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is written into the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("megalm", *OUTSIDE):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)], out)
    (built,) = out.glob("megalm-*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megalm").rglob("*.py")}
    for folder in OUTSIDE:
        files = [path for path in (ROOT / folder).iterdir() if path.is_file()]
        assert files
        wanted |= {f"megalm/{folder}/{path.name}" for path in files}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "megalm/recipes").glob("*.yaml")}
    wanted.add("megalm/py.typed")
    assert not wanted - names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"megalm"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert metadata["Requires-Python"] == ">=3.11"
    assert "deepspeed==0.19.8" in required
    assert "torch<2.14,>=2.11" in required
    assert not [line for line in required if re.match(r"(?i)(apex|kernels|mpi4py)\b", line)]
    assert {"dev", "mpi"} <= set(metadata.get_all("Provides-Extra", []))


def test_every_version_is_pinned_exactly_and_names_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    assert {"torch==2.13.0", "triton==3.7.1", "deepspeed==0.19.8"} <= set(pins)


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    zipfile.ZipFile(wheel).extractall(packages)
    # The dependencies come from this environment, without the editable megalm that it may hold.
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (packages / "dependencies.pth").write_text("\n".join(sorted(theirs)) + "\n", encoding="utf-8")

    where = run([str(python), "-c", "import megalm.kernels as k; print(k.__file__)"], empty)
    assert where.startswith(str(packages))
    listed = run([str(python), "-m", "megalm", "config", "list"], empty)
    assert "gpt-tiny" in listed
    assert "zero2-offload" in listed
    shown = run([str(python), "-m", "megalm", "config", "show", "gpt-tiny", "zero.stage=3", "--deepspeed"], empty)
    assert '"stage": 3' in shown
    script = "from importlib.resources import files; print((files('megalm.slurm') / 'pretrain.sbatch').is_file())"
    assert run([str(python), "-c", script], empty) == "True\n"
    assert not list(empty.iterdir())
