"""What a world leaves in a process that forms another one: no process group, whose threads would wake for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from tests.parity.harness import Case, build_trainer
from tests.worker_pool import WorkerPool


def train_one_step(mesh: ParallelMesh, case: Case) -> None:
    build_trainer(mesh, case.config()).train_step()


def gloo_loops(mesh: ParallelMesh) -> int:
    """Return how many threads serve the connections of process groups, dead ones too."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("gloo_tcp_loop")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"zero.stage": 1},
        {"zero.stage": 2, "overlap.gradients": True},
        {"zero.stage": 3},
        {"overlap.gradients": True},
        {"optim.kind": "muon", "zero.stage": 1},
    ],
    ids=str,
)
def test_a_world_that_was_left_keeps_no_group(pool: WorkerPool, overrides: dict[str, Any]) -> None:
    case = Case(1, 2, 1, overrides)
    counts = []
    for _ in range(3):
        pool.run(train_one_step, case, layout=case.layout)
        counts.append(pool.run(gloo_loops, layout=RankLayout(data=2)))
    assert min(counts[0]) > 0, "threads have another name by now"
    assert counts[1] == counts[2], "each world leaves threads"
