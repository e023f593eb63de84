"""Before the first step: a fault of one node stops all ranks alike, with its name; healthy ranks lose no time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import MegalmError
from megalm.preflight.gate import Probes, compared_versions, preflight
from megalm.preflight.storage import checkpoint_bytes
from tests.worker_pool import WorkerPool

LAYOUT = RankLayout(pipeline=2, data=2, tensor=1)
PARAMETERS = 1_000_000


def recipe(run_dir: Path, *overrides: str) -> RunConfig:
    return load_recipe("gpt-tiny", [f"run.dir={run_dir}", *overrides])


def no_space(path: Path) -> Any:
    return SimpleNamespace(f_bavail=1, f_frsize=2**20, f_blocks=10, f_favail=5, f_files=50)


def no_write(path: Path) -> None:
    raise OSError(30, "Read-only file system")


def pass_gate(mesh: ParallelMesh, run_dir: str, fault: str) -> Any:
    """Return what the gate raises where rank 2 has the fault, as (class, status, message), and the seconds it took."""
    broken = mesh.rank == 2
    os.environ["LOCAL_RANK"] = "0"  # each rank plays a node of its own
    changes: dict[str, Any] = {"node": lambda: f"node{mesh.rank + 1}"}
    if broken and fault == "version":
        changes["versions"] = lambda: {**compared_versions(), "torch": "1.0"}
    if broken and fault == "disk":
        changes["statvfs"] = no_space
    if broken and fault == "write":
        changes["write"] = no_write
    if broken and fault == "clock":
        changes["clock"] = lambda: time.time() - 30.0
    if broken and fault == "memory":
        changes["memory"] = lambda device: 2**20
    begin = time.monotonic()
    try:
        preflight(recipe(Path(run_dir)), mesh, PARAMETERS, Probes(**changes))
    except MegalmError as error:
        return type(error).__name__, error.exit_status, str(error)
    return None, 0, time.monotonic() - begin


@pytest.mark.parametrize(
    ("fault", "kind", "status", "words"),
    [
        ("version", "LaunchError", 2, "torch 1.0 where others have"),
        ("disk", "ConfigError", 2, "1.0 MiB free at run.dir="),
        ("write", "DistributedError", 1, "cannot be written (Read-only file system)"),
        ("clock", "DistributedError", 1, "the clock differs from the median of all nodes by -30 s"),
        ("memory", "DistributedError", 1, "1.0 MiB of memory free on cpu"),
    ],
)
def test_a_fault_stops_all_ranks_alike(
    pool: WorkerPool, tmp_path: Path, fault: str, kind: str, status: int, words: str
) -> None:
    answers = pool.run(pass_gate, str(tmp_path), fault, layout=LAYOUT)
    assert len(set(answers)) == 1, answers
    name, code, message = answers[0]
    assert (name, code) == (kind, status), message
    assert message.startswith("preflight: node3: ")
    assert words in message and "\n" not in message


def test_healthy_ranks_pass_quickly_and_leave_nothing_behind(pool: WorkerPool, tmp_path: Path) -> None:
    layout = RankLayout(pipeline=2, data=4, tensor=1)
    pool.run(pass_gate, str(tmp_path), "none", layout=layout)  # imports
    answers = pool.run(pass_gate, str(tmp_path), "none", layout=layout)
    assert [answer[0] for answer in answers] == [None] * 8
    assert max(answer[2] for answer in answers) < 2.0, answers
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_one_is_checked_too(pool: WorkerPool, tmp_path: Path) -> None:
    ((_, _, message),) = pool.run(on_a_full_disk, str(tmp_path), layout=RankLayout(1, 1, 1))
    assert message.startswith("preflight: node1: 1.0 MiB free")


def on_a_full_disk(mesh: ParallelMesh, run_dir: str) -> Any:
    try:
        preflight(recipe(Path(run_dir)), mesh, PARAMETERS, Probes(node=lambda: "node1", statvfs=no_space))
    except MegalmError as error:
        return type(error).__name__, error.exit_status, str(error)
    return None, 0, ""


def test_checkpoints_are_estimated_from_the_parameters(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    assert config.optim.kind == "adamw"
    assert checkpoint_bytes(config, 10**9) == int(1.02 * 12 * 10**9)
    assert checkpoint_bytes(recipe(tmp_path, "optim.kind=sgd"), 10**9) == int(1.02 * 4 * 10**9)
    assert checkpoint_bytes(recipe(tmp_path, "optim.kind=sgd", "optim.momentum=0.9"), 10**9) == int(1.02 * 8 * 10**9)
    muon = recipe(tmp_path, "optim.kind=muon")
    hidden = sum(muon.model.hidden_matrices.values())
    assert 0 < hidden < 10**9
    assert checkpoint_bytes(muon, 10**9) == int(1.02 * (8 * hidden + 12 * (10**9 - hidden)))


def test_the_gate_is_on_unless_the_recipe_says_no(tmp_path: Path) -> None:
    assert recipe(tmp_path).run.preflight
    assert not recipe(tmp_path, "run.preflight=false").run.preflight
