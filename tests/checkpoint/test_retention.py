"""Which checkpoints stay: the newest, each n-th step's, the best; over a resume too, and none that is needed goes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.manager import CheckpointManager
from megalm.checkpoint.retention import METRIC, Keep, metric_of, stored_metric, superfluous
from megalm.distributed.sharding import Fragment, ShardSpec
from tests.checkpoint.simulated import HastyFileSystem

SPEC = ShardSpec.whole("x", (4,))
LOSS = "evaluate/loss"


@pytest.mark.parametrize(
    ("keep", "metrics", "stays"),
    [
        (Keep(2), {}, [50, 60]),
        (Keep(1, every=20), {}, [20, 40, 60]),
        (Keep(1, best=LOSS), {10: 3.0, 20: 1.0, 30: 2.0, 40: math.nan}, [20, 60]),
        (Keep(1, best=LOSS), {10: 3.0, 60: 1.0}, [60]),
        (Keep(1, best=LOSS), {10: 1.0, 30: 1.0}, [30, 60]),
        (Keep(1, best=LOSS), {10: math.inf, 20: -math.inf}, [60]),
        (Keep(1), {20: 1.0}, [60]),
        (Keep(2, every=30, best=LOSS), {10: 0.5}, [10, 30, 50, 60]),
        (Keep(9), {}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_what_stays(keep: Keep, metrics: dict[int, float], stays: list[int]) -> None:
    steps = list(range(10, 70, 10))
    assert sorted(set(steps) - set(superfluous(steps, keep, metrics))) == stays


def save(manager: CheckpointManager, step: int, loss: float | None, name: str = LOSS) -> None:
    metric = {} if loss is None else {METRIC: {"name": name, "value": loss, "step": step}}
    manager.save(step, [Fragment(SPEC, "weight", 0, torch.zeros(4))], {"step": step, **metric})


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_the_best_outlives_a_resume_and_gives_way_to_a_better_one(tmp_path: Path) -> None:
    keep = Keep(1, every=100, best=LOSS)
    manager = CheckpointManager(tmp_path, keep, files=HastyFileSystem())
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None)):
        save(manager, step, loss)
    assert steps(tmp_path) == [20, 40]
    manager = CheckpointManager(tmp_path, keep, files=HastyFileSystem())
    save(manager, 50, 1.5)
    assert steps(tmp_path) == [20, 50]
    save(manager, 60, 0.5)
    save(manager, 100, 7.0)
    save(manager, 110, 7.0)
    assert steps(tmp_path) == [60, 100, 110]
    manager.drop_after(100)
    save(manager, 110, 9.0, "train/loss")  # of another metric
    assert steps(tmp_path) == [60, 100, 110]
    manager = CheckpointManager(tmp_path, Keep(1, best="train/loss"), files=HastyFileSystem())
    save(manager, 120, 9.5, "train/loss")
    assert steps(tmp_path) == [110, 120]


def test_a_better_one_of_a_later_step_that_a_run_went_back_from_does_not_count(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, Keep(2, best=LOSS), files=HastyFileSystem())
    for step, loss in ((10, 2.0), (20, 0.1)):
        save(manager, step, loss)
    manager.drop_after(10)
    for step, loss in ((20, 3.0), (30, 4.0), (40, None)):
        save(manager, step, loss)
    assert steps(tmp_path) == [10, 30, 40]


def test_a_metric_is_read_from_any_state_without_harm(tmp_path: Path) -> None:
    for text in ("not json", "[1]", "{}", '{"metric": 3}', '{"metric": {"name": "evaluate/loss", "value": "low"}}'):
        (tmp_path / "state.json").write_text(text)
        assert stored_metric(tmp_path, LOSS) is None
    assert stored_metric(tmp_path / "nowhere", LOSS) is None
    (tmp_path / "state.json").write_text(json.dumps({METRIC: {"name": LOSS, "value": 2, "step": 1}}))
    assert stored_metric(tmp_path, LOSS) == 2.0 and stored_metric(tmp_path, "train/loss") is None
    assert metric_of({}, None) is None
