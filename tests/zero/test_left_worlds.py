"""What a world leaves in a process that forms another one: no process group, whose threads would wake for ever."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from tests.parity.harness import Case, build_trainer
from tests.worker_pool import WorkerPool

STILL = 10  # readings in a row that say the same


def train_one_step(mesh: ParallelMesh, case: Case) -> None:
    build_trainer(mesh, case.config()).train_step()


def count_gloo_loops() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            names.append((task / "comm").read_text().strip())
    return names.count("gloo_tcp_loop")


def gloo_loops(mesh: ParallelMesh) -> int:
    """Return how many threads serve the connections of process groups, dead ones too.

    A thread gives itself its name only once it runs, and takes its time to end: the figure is one that stood still.
    """
    counts = [count_gloo_loops()]
    while len(counts) < STILL or len(set(counts[-STILL:])) > 1:
        time.sleep(0.05)
        counts.append(count_gloo_loops())
    return counts[-1]


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
