"""Every kernel compiles for sm_90 as it should; `make kernels-compile` checks all variants and targets."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_check import check, table
from tests.kernels.compile_worker import ROOT, Row

FAULTS = Path(__file__).parent / "faults"
TOOLS = ("ptxas", "cuobjdump", "nvdisasm")


def missing() -> str | None:
    """Return why nothing can be compiled on this machine, if so."""
    if platform.system() != "Linux":
        return f"triton has no compiler for {platform.system()}"
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "triton is not installed"
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    absent = [name for name in TOOLS if not (tools / name).exists()]
    return f"triton comes without {', '.join(absent)}" if absent else None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def test_every_kernel_compiles_without_spills_within_shared_memory_and_with_wgmma() -> None:
    rows = check(["sm_90"], short=True)
    assert len({row.kernel for row in rows}) > 10
    failed = [row for row in rows if row.problems]
    assert not failed, "\n".join(table(failed))


def test_no_seed_has_a_kernel_compiled_for_itself() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.seed_variants"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: [f"{name}: 0"] for name in ("attention", "norm", "adamw", "dropout")}


def test_the_check_finds_every_planted_fault() -> None:
    def problems(row: Row) -> tuple[str, list[str]]:
        return row.kernel.removeprefix("faulty_launches."), [problem.split(":")[0] for problem in row.problems]

    rows = check(["sm_90"], folder=FAULTS)
    assert sorted(map(problems, rows)) == [
        ("broken.*", ["no import"]),
        ("faulty.*", ["no launch"]),
        ("forgotten", ["no launch"]),
        ("sound", []),
        ("spilling", ["spills"]),
        ("too_much_shared", ["shared memory above 227 KB"]),
        ("without_wgmma", ["no wgmma"]),
        ("wrong", ["does not compile"]),
    ]
