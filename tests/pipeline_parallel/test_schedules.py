"""The orders of the schedules, written out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megalm.errors import ConfigError
from megalm.pipeline_parallel.schedules import SCHEDULES, ActionKind, GPipe, OneForwardOneBackward, Schedule


def written(schedule: Schedule, stage: int) -> str:
    letter = {ActionKind.FORWARD: "F", ActionKind.BACKWARD: "B"}
    return " ".join(f"{letter[action.kind]}{action.microbatch}" for action in schedule.actions(stage))


def test_gpipe_runs_all_forwards_and_then_all_backwards() -> None:
    assert [written(GPipe(2, 3), stage) for stage in range(2)] == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_alternates_after_its_warmup() -> None:
    assert [written(OneForwardOneBackward(3, 4), stage) for stage in range(3)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_1f1b_with_fewer_microbatches_than_stages() -> None:
    assert [written(OneForwardOneBackward(4, 2), stage) for stage in range(4)] == [
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 B0 F1 B1",
    ]


def test_one_stage_of_1f1b_accumulates_gradients_one_microbatch_at_a_time() -> None:
    assert written(OneForwardOneBackward(1, 3), 0) == "F0 B0 F1 B1 F2 B2"


def test_schedules_are_found_by_name_and_an_unknown_name_lists_them() -> None:
    assert SCHEDULES.get("gpipe") is GPipe
    assert SCHEDULES.get("1f1b") is OneForwardOneBackward
    with pytest.raises(ConfigError, match="1f1b"):
        SCHEDULES.get("1f1")


@pytest.mark.parametrize(("stages", "microbatches"), [(0, 1), (1, 0)])
def test_a_schedule_needs_a_stage_and_a_microbatch(stages: int, microbatches: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GPipe(stages, microbatches)


def test_schedules_simulator_and_partition_import_no_torch() -> None:
    program = (
        "import sys, megalm.pipeline_parallel.simulator, megalm.pipeline_parallel.partition; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
