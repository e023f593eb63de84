"""The simulator's figures are those of the papers, and planted mistakes in schedules are caught."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.pipeline_parallel.schedules import (
    SCHEDULES,
    Action,
    ActionKind,
    GPipe,
    OneForwardOneBackward,
    Schedule,
)
from megalm.pipeline_parallel.simulator import ScheduleError, simulate

F, B = ActionKind.FORWARD, ActionKind.BACKWARD
stage_counts, microbatch_counts = st.integers(1, 12), st.integers(1, 24)
times = st.floats(0.125, 8.0)


@settings(deadline=None)  # an example's time says how busy the cores are, not whether the schedule is right
@given(st.sampled_from(sorted(SCHEDULES.names())), stage_counts, microbatch_counts, times, times)
def test_bubble_is_that_of_the_papers(name: str, p: int, m: int, forward: float, backward: float) -> None:
    simulation = simulate(SCHEDULES.get(name)(p, m), forward, backward)
    assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert simulation.makespan == pytest.approx((m + p - 1) * (forward + backward))
    assert simulation.busy == pytest.approx([m * (forward + backward)] * p)


@settings(deadline=None)
@given(stage_counts, microbatch_counts)
def test_peak_of_live_activations(p: int, m: int) -> None:
    assert simulate(GPipe(p, m)).peak_live == (m,) * p
    assert simulate(OneForwardOneBackward(p, m)).peak_live == tuple(min(p - stage, m) for stage in range(p))


def test_times_of_a_small_case_written_out() -> None:
    # Stage 1: F0 1.5-2.5, B0 2.5-4.5, F1 4.5-5.5, B1 5.5-7.5. Stage 0: F0 0-1, F1 1-2, B0 5-7, B1 8-10.
    simulation = simulate(OneForwardOneBackward(2, 2), 1.0, 2.0, transfer_time=0.5)
    assert simulation.makespan == 10.0
    assert simulation.busy == (6.0, 6.0)
    assert simulation.bubble == pytest.approx(0.4)


class Written(Schedule):
    """A schedule of given streams."""

    def __init__(self, microbatches: int, streams: list[list[Action]]) -> None:
        super().__init__(len(streams), microbatches)
        self.streams = streams

    def actions(self, stage: int) -> Iterator[Action]:
        return iter(self.streams[stage])


def parse(text: str) -> list[Action]:
    return [Action(F if word[0] == "F" else B, int(word[1:])) for word in text.split()]


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        pytest.param(["F0 B0", "F0"], r"stage 1 misses BACKWARD\(0\)", id="missing"),
        pytest.param(["F0 F0 B0", "F0 B0"], r"stage 0 runs more than once FORWARD\(0\)", id="doubled"),
        pytest.param(["F0 B0", "F0 B0 F1"], r"stage 1 has the unknown action FORWARD\(1\)", id="invented"),
        pytest.param(
            ["F0 F1 B0 B1", "F1 F0 B0 B1"],
            r"link from stage 0 to stage 1 is out of order at message 0: stage 0 sends FORWARD\(0\), "
            r"stage 1 expects FORWARD\(1\)",
            id="activations out of order",
        ),
        pytest.param(
            ["F0 F1 B1 B0", "F0 B0 F1 B1"],
            r"link from stage 1 to stage 0 is out of order at message 0: stage 1 sends BACKWARD\(0\)",
            id="gradients out of order",
        ),
        pytest.param(
            ["F0 B0 F1 B1", "F0 F1 B0 B1"],
            r"deadlock: stage 0 at BACKWARD\(0\) waits for BACKWARD\(0\) of stage 1; "
            r"stage 1 at FORWARD\(1\) waits for FORWARD\(1\) of stage 0",
            id="circle of waits",
        ),
        pytest.param(
            ["B0 F0"],
            r"deadlock: stage 0 at BACKWARD\(0\) comes before its own FORWARD\(0\)",
            id="backward first",
        ),
    ],
)
def test_planted_mistakes_are_named(streams: list[str], message: str) -> None:
    parsed = [parse(stream) for stream in streams]
    microbatches = 1 + max(action.microbatch for action in parsed[0])
    with pytest.raises(ScheduleError, match=message):
        simulate(Written(microbatches, parsed))


def drop(stream: list[Action], i: int, j: int) -> list[Action]:
    return stream[:i] + stream[i + 1 :]


def double(stream: list[Action], i: int, j: int) -> list[Action]:
    return [*stream[:i], stream[i], *stream[i:]]


def swap_kinds_order(stream: list[Action], i: int, j: int) -> list[Action]:
    """Swap two actions of one kind: with a neighbour stage that keeps its order, a link is out of order."""
    same = [k for k, action in enumerate(stream) if action.kind is stream[i].kind]
    k = same[j % len(same)]
    changed = list(stream)
    changed[i], changed[k] = changed[k], changed[i]
    return changed


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES.names())),
    st.integers(2, 6),
    st.integers(2, 8),
    st.sampled_from([drop, double, swap_kinds_order]),
    st.data(),
)
def test_any_dropped_doubled_or_swapped_action_is_caught(
    name: str, p: int, m: int, plant: Callable[[list[Action], int, int], list[Action]], data: st.DataObject
) -> None:
    good = SCHEDULES.get(name)(p, m)
    streams = [list(good.actions(stage)) for stage in range(p)]
    stage = data.draw(st.integers(0, p - 1))
    i, j = data.draw(st.integers(0, 2 * m - 1)), data.draw(st.integers(0, m - 1))
    broken = plant(streams[stage], i, j)
    if broken == streams[stage]:
        return
    streams[stage] = broken
    with pytest.raises(ScheduleError):
        simulate(Written(m, streams))


def test_large_schedules_take_seconds_at_most() -> None:
    started = time.perf_counter()
    simulation = simulate(OneForwardOneBackward(128, 1024))
    assert time.perf_counter() - started < 20.0  # 1 s alone; a quadratic step would take minutes
    assert simulation.peak_live[0] == 128
