"""A checkpoint goes from one layout to another and trains on: `make reshard-pairs` for all pairs, here a handful."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.reshard_pairs import LAYOUTS, run
from tests.worker_pool import WorkerPool

NAMES = ["t2c2e2 ring", "p2d2e2z1 interleaved", "c2d2z3 ulysses"]
PAIRS = {(NAMES[0], NAMES[1]), (NAMES[1], NAMES[2]), (NAMES[2], NAMES[0]), (NAMES[1], NAMES[1])}


@pytest.mark.slow
def test_other_layouts_keep_every_bit_and_go_on_alike(pool: WorkerPool, tmp_path: Path) -> None:
    result = run(pool, tmp_path, NAMES, PAIRS, after=4)
    assert result.wrong == []
    assert result.worst.keys() == PAIRS and result.tensors > 4 * 100


def test_the_layouts_have_every_axis_and_stage() -> None:
    layouts = [case.layout for case in LAYOUTS.values()]
    assert len(layouts) >= 14
    for axis in ("tensor", "pipeline", "data", "context", "expert"):
        assert max(getattr(layout, axis) for layout in layouts) > 1, axis
    assert {case.overrides.get("zero.stage", 0) for case in LAYOUTS.values()} == {0, 1, 2, 3}
    assert {case.overrides.get("parallel.schedule", "1f1b") for case in LAYOUTS.values()} >= {"zb-v", "interleaved"}
