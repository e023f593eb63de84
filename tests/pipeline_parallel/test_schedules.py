"""The orders of the schedules, written out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megalm.errors import ConfigError
from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule
from megalm.pipeline_parallel.schedules import SCHEDULES, GPipe, OneForwardOneBackward


def written(schedule: Schedule, stage: int) -> str:
    """Return a stage's actions: I and W are the two halves of a backward, a stroke marks the second chunk."""
    letters = dict(zip(ActionKind, "FBIW", strict=True))
    actions = schedule.actions(stage)
    return " ".join(letters[action.kind] + str(action.microbatch) + action.chunk * "'" for action in actions)


def streams(name: str, stages: int, microbatches: int, chunks: int | None = None) -> list[str]:
    schedule = SCHEDULES.get(name)(stages, microbatches, chunks)
    return [written(schedule, stage) for stage in range(stages)]


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


def test_interleaving_takes_as_many_microbatches_as_stages_through_each_chunk() -> None:
    assert streams("interleaved", 2, 2, 2) == ["F0 F1 F0' F1' B0' B1' B0 B1", "F0 F1 F0' B0' F1' B1' B0 B1"]


def test_microbatches_that_make_no_whole_round_are_those_of_a_longer_step() -> None:
    assert streams("interleaved", 2, 3, 2) == [
        "F0 F1 F0' F1' F2 B0' B1' F2' B0 B1 B2' B2",
        "F0 F1 F0' B0' F1' B1' F2 B0 B1 F2' B2' B2",
    ]
    longer = SCHEDULES.get("interleaved")(2, 4, 2)
    shorter = SCHEDULES.get("interleaved")(2, 3, 2)
    for stage in range(2):
        assert list(shorter.actions(stage)) == [a for a in longer.actions(stage) if a.microbatch < 3]


def test_breadth_first_takes_all_microbatches_through_each_chunk() -> None:
    assert streams("breadth-first", 2, 2, 2) == ["F0 F1 F0' F1' B0' B1' B0 B1"] * 2


def test_zb_h1_runs_weight_gradients_as_many_microbatches_late_as_stages_are_before() -> None:
    assert streams("zb-h1", 3, 4) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_zb_h2_warms_up_with_twice_as_many_forwards() -> None:
    assert streams("zb-h2", 3, 5) == [
        "F0 F1 F2 F3 F4 I0 W0 I1 W1 I2 W2 I3 W3 I4 W4",
        "F0 F1 F2 I0 F3 I1 F4 I2 W0 I3 W1 I4 W2 W3 W4",
        "F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4",
    ]


def test_zb_v_runs_down_one_leg_and_up_the_other() -> None:
    assert streams("zb-v", 2, 3) == [
        "F0 F1 F2 F0' I0' W0' F1' I1' W1' I0 W0 F2' I2' W2' I1 W1 I2 W2",
        "F0 F0' F1 F1' I0' W0' F2 I0 W0 F2' I1' W1' I1 I2' I2 W1 W2' W2",
    ]


def test_dualpipe_v_splits_backwards_at_its_ends_only() -> None:
    assert streams("dualpipe-v", 2, 4) == [
        "F0 F1 F2 F0' I0' W0' F1' F3 B1' F2' B0 B2' F3' B1 B3' I2 W2 I3 W3",
        "F0 F0' F1 F1' F2 B0' F2' B0 F3 B1' F3' B1 B2' B2 I3' I3 W3' W3",
    ]


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_what_an_action_gets_is_what_the_other_one_gives(name: str) -> None:
    schedule = SCHEDULES.get(name)(3, 2)
    for stage in range(3):
        for action in schedule.actions(stage):
            target = schedule.target(stage, action)
            if target is not None:
                assert schedule.source(*target) == (stage, action._replace(kind=target[1].kind))
    first, last = Action(ActionKind.FORWARD, 0), Action(ActionKind.FORWARD, 1, schedule.chunks - 1)
    assert schedule.source(0, first) is None and schedule.target(schedule.placement.last_stage, last) is None


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
