"""The simulator's figures are those of the papers, and planted mistakes in schedules are caught."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule
from megalm.pipeline_parallel.schedules import SCHEDULES, GPipe, OneForwardOneBackward
from megalm.pipeline_parallel.simulator import ScheduleError, simulate

F, B = ActionKind.FORWARD, ActionKind.BACKWARD
KINDS = dict(zip("FBIW", ActionKind, strict=True))
stage_counts, microbatch_counts = st.integers(1, 12), st.integers(1, 24)
times = st.floats(0.125, 8.0)


def make(name: str, p: int, m: int, v: int = 2) -> Schedule:
    kind = SCHEDULES.get(name)
    return kind(p, m, v if kind.fixed_chunks is None else None)


@settings(deadline=None)  # an example's time says how busy the cores are, not whether the schedule is right
@given(st.sampled_from(["gpipe", "1f1b"]), stage_counts, microbatch_counts, times, times)
def test_bubble_is_that_of_the_papers(name: str, p: int, m: int, forward: float, backward: float) -> None:
    simulation = simulate(SCHEDULES.get(name)(p, m), forward, backward)
    assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert simulation.makespan == pytest.approx((m + p - 1) * (forward + backward))
    assert simulation.busy == pytest.approx([m * (forward + backward)] * p)


@settings(deadline=None)
@given(
    st.sampled_from(["interleaved", "breadth-first"]),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(2, 5),
    times,
    times,
)
def test_v_chunks_make_a_v_th_of_the_bubble(
    name: str, p: int, rounds: int, v: int, forward: float, backward: float
) -> None:
    simulation = simulate(make(name, p, p * rounds, v), forward, backward)
    assert simulation.bubble == pytest.approx((p - 1) / (v * p * rounds + p - 1), abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 10), st.integers(0, 20))
def test_zero_bubble_schedules_lose_what_the_papers_say_where_all_passes_take_equally_long(p: int, more: int) -> None:
    """(p-1)(F+I-W) under ZB-H1, (p-1)(F+I-2W) = 0 between a stage's own ends under ZB-H2, (p-1)F/2 under the folded."""
    m = 2 * p + more
    h1, h2, v, dual = (simulate(make(name, p, m)) for name in ("zb-h1", "zb-h2", "zb-v", "dualpipe-v"))
    assert h1.makespan == pytest.approx(3 * m + p - 1)
    assert max(h2.spans) == pytest.approx(3 * m) and h2.makespan == pytest.approx(3 * m + p - 1)
    assert max(v.spans) == pytest.approx(3 * m)
    assert v.makespan == dual.makespan == pytest.approx(3 * m + (p - 1) / 2)


@settings(deadline=None)
@given(st.integers(1, 12), st.data(), times, times, st.floats(0.1, 1.0))
def test_few_microbatches_leave_the_bubble_that_appendix_h_says(
    p: int, data: st.DataObject, forward: float, input_time: float, share: float
) -> None:
    m, weight = data.draw(st.integers(1, p)), share * min(forward, input_time)
    simulation = simulate(make("zb-h1", p, m), forward, input_time + weight, weight_time=weight)
    assert simulation.makespan == pytest.approx((m + p - 1) * (forward + input_time) + weight)


PUBLISHED = (
    # model, p, m, layers, F, I, W, transfer; bubbles of 1F1B, interleaved, ZB-H1, ZB-H2 in percent
    ("1.5B", 8, 24, 24, 18.522, 18.086, 9.337, 0.601, (24.31, 10.55, 15.85, 10.83)),
    ("1.5B", 8, 32, 24, 18.513, 18.086, 9.331, 0.626, (19.85, 8.18, 12.42, 8.37)),
    ("1.5B", 8, 64, 24, 18.546, 18.097, 9.321, 0.762, (12.40, 4.43, 6.74, 4.44)),
    ("6.2B", 8, 24, 32, 29.718, 29.444, 19.927, 0.527, (23.47, 8.08, 13.23, 6.98)),
    ("6.2B", 8, 32, 32, 29.802, 29.428, 19.530, 0.577, (18.98, 6.28, 10.45, 5.59)),
    ("6.2B", 8, 64, 32, 29.935, 29.621, 19.388, 0.535, (10.91, 3.20, 5.54, 2.94)),
    ("14.6B", 16, 48, 48, 11.347, 11.248, 8.132, 0.377, (25.52, 11.04, 13.97, 6.72)),
    ("14.6B", 16, 64, 48, 11.307, 11.254, 8.101, 0.379, (20.82, 8.52, 10.88, 5.16)),
    ("14.6B", 16, 128, 48, 11.325, 11.308, 8.109, 0.378, (12.51, 4.45, 5.76, 2.66)),
    ("28.3B", 32, 96, 64, 10.419, 10.207, 7.715, 0.408, (26.46, 14.93, 14.21, 6.41)),
    ("28.3B", 32, 128, 64, 10.408, 10.204, 7.703, 0.408, (21.68, 11.64, 11.06, 4.90)),
    ("28.3B", 32, 256, 64, 10.402, 10.248, 7.698, 0.460, (13.52, 6.24, 5.94, 2.57)),
)
"""Qi et al. 2024, tables 5 and 6: profiled times in ms and the bubbles that follow, without a flush between steps.

Their interleaving has a layer a chunk, the end stages one less: here as many as the others.
"""


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]} m={row[2]}")
def test_bubbles_are_the_published_ones(row: tuple[str, int, int, int, float, float, float, float, tuple]) -> None:
    _, p, m, layers, forward, input_time, weight, transfer, published = row
    found = {}
    for name in ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"):
        schedule = make(name, p, m, layers // p)
        simulation = simulate(schedule, forward, input_time + weight, transfer, weight_time=weight)
        found[name] = 100 * simulation.bubble_without_flush
    for name, wanted in zip(("1f1b", "zb-h1", "zb-h2"), (published[0], *published[2:]), strict=True):
        assert found[name] == pytest.approx(wanted, abs=0.011), name  # they round to 0.01
    assert found["interleaved"] == pytest.approx(published[1], abs=0.5)
    assert found["1f1b"] > found["zb-h1"] > found["zb-h2"] > found["zb-v"]
    assert found["zb-h1"] > found["dualpipe-v"] > found["zb-v"]


@settings(deadline=None)
@given(stage_counts, microbatch_counts)
def test_peak_of_live_activations(p: int, m: int) -> None:
    assert simulate(GPipe(p, m)).peak_live == (m,) * p
    assert simulate(OneForwardOneBackward(p, m)).peak_live == tuple(min(p - stage, m) for stage in range(p))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 5))
def test_peak_of_live_chunks(p: int, rounds: int, v: int) -> None:
    m = p * rounds
    interleaved = tuple(min(2 * (p - 1 - s) + (v - 1) * p + 1, v * m) for s in range(p))
    assert simulate(make("interleaved", p, m, v)).peak_live == interleaved
    assert simulate(make("breadth-first", p, m, v)).peak_live == (v * m,) * p


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 12), st.floats(0.0, 1.0))
def test_peak_where_weight_gradients_need_a_part_of_the_activations(p: int, more: int, kept: float) -> None:
    """Qi et al. 2024, section 2.3, of worker s + 1; of the folded schedules where all is kept."""
    m = 2 * p + more
    h1 = simulate(make("zb-h1", p, m), kept=kept).peak_live
    h2 = simulate(make("zb-h2", p, m), kept=kept).peak_live
    assert h1 == pytest.approx([p - s + s * kept for s in range(p)])
    assert h2 == pytest.approx([2 * (p - s) - 1 + 2 * s * kept for s in range(p)])
    assert simulate(make("zb-v", p, m)).peak_live == (2 * p,) * p
    assert simulate(make("dualpipe-v", p, m)).peak_live == (2 * p + 1,) * p


@settings(deadline=None)
@given(st.sampled_from(SCHEDULES.names()), st.integers(1, 8), st.integers(1, 30), st.integers(2, 4))
def test_no_stage_waits_in_a_circle_with_as_many_messages_open_as_the_schedule_says(
    name: str, p: int, m: int, v: int
) -> None:
    schedule = make(name, p, m, v)
    bounded = simulate(schedule, most_in_flight=schedule.most_in_flight)
    assert bounded == simulate(schedule)


def test_too_few_open_messages_are_a_deadlock() -> None:
    with pytest.raises(ScheduleError, match=r"deadlock: .*stage 1 at FORWARD\(3\) has 3 messages open"):
        simulate(make("breadth-first", 2, 17), most_in_flight=3)


def test_times_of_a_small_case_written_out() -> None:
    # Stage 1: F0 1.5-2.5, B0 2.5-4.5, F1 4.5-5.5, B1 5.5-7.5. Stage 0: F0 0-1, F1 1-2, B0 5-7, B1 8-10.
    simulation = simulate(OneForwardOneBackward(2, 2), 1.0, 2.0, transfer_time=0.5)
    assert simulation.makespan == 10.0
    assert simulation.busy == (6.0, 6.0)
    assert simulation.bubble == pytest.approx(0.4)


class Written(Schedule):
    """A schedule of given streams, its pieces of the model placed as those of another."""

    def __init__(self, like: Schedule, streams: list[list[Action]]) -> None:
        self.fixed_chunks = like.chunks
        super().__init__(len(streams), like.microbatches)
        self.placement = like.placement
        self.streams = streams

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        return iter(self.streams[stage])

    def actions(self, stage: int) -> Iterator[Action]:
        return self.order(stage, self.microbatches)


def parse(text: str) -> list[Action]:
    return [Action(KINDS[word[0]], int(word[1:].rstrip("'")), word.count("'")) for word in text.split()]


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
        pytest.param(["F0 I0", "F0 B0"], r"stage 0 misses WEIGHT_GRADIENT\(0\)", id="half a backward"),
        pytest.param(["F0 I0 W0 W0"], r"stage 0 runs more than once WEIGHT_GRADIENT\(0\)", id="weights twice"),
        pytest.param(["F0 B0 W0"], r"stage 0 has the unknown action WEIGHT_GRADIENT\(0\)", id="whole and half"),
        pytest.param(
            ["F0 W0 I0"],
            r"deadlock: stage 0 at WEIGHT_GRADIENT\(0\) comes before its own INPUT_GRADIENT\(0\)",
            id="weights first",
        ),
    ],
)
def test_planted_mistakes_are_named(streams: list[str], message: str) -> None:
    parsed = [parse(stream) for stream in streams]
    microbatches = 1 + max(action.microbatch for action in parsed[0])
    with pytest.raises(ScheduleError, match=message):
        simulate(Written(GPipe(len(parsed), microbatches), parsed))


@pytest.mark.parametrize(
    ("name", "streams", "message"),
    [
        pytest.param(
            "interleaved",
            ["F0 F0' B0' B0", "F0' F0 B0' B0"],
            r"link from stage 0 to stage 1 is out of order at message 0: stage 0 sends FORWARD\(0\), "
            r"stage 1 expects FORWARD\(0\) of chunk 1",
            id="chunks exchanged",
        ),
        pytest.param(
            "zb-v",
            ["F0 F0' B0' B0", "F0' F0 B0 B0'"],
            r"deadlock: .*stage 1 at FORWARD\(0\) of chunk 1 waits for FORWARD\(0\) of stage 1",
            id="the second leg first",
        ),
    ],
)
def test_planted_mistakes_between_chunks_are_named(name: str, streams: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        simulate(Written(make(name, 2, 1), [parse(stream) for stream in streams]))


def drop(stream: list[Action], i: int, j: int) -> list[Action]:
    return stream[:i] + stream[i + 1 :]


def double(stream: list[Action], i: int, j: int) -> list[Action]:
    return [*stream[:i], stream[i], *stream[i:]]


def swap_kinds_order(stream: list[Action], i: int, j: int) -> list[Action]:
    """Swap two actions of one kind and chunk: with a neighbour stage that keeps its order, a link is out of order.

    Not so for weight gradients, for whose order nobody waits.
    """
    if stream[i].kind is ActionKind.WEIGHT_GRADIENT:
        return stream
    same = [k for k, action in enumerate(stream) if action[::2] == stream[i][::2]]
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
    good = make(name, p, m)
    streams = [list(good.actions(stage)) for stage in range(p)]
    stage = data.draw(st.integers(0, p - 1))
    i, j = data.draw(st.integers(0, len(streams[stage]) - 1)), data.draw(st.integers(0, m - 1))
    broken = plant(streams[stage], i, j)
    if broken == streams[stage]:
        return
    streams[stage] = broken
    with pytest.raises(ScheduleError):
        simulate(Written(good, streams))


def test_large_schedules_take_seconds_at_most() -> None:
    started = time.perf_counter()
    simulation = simulate(OneForwardOneBackward(128, 1024))
    assert time.perf_counter() - started < 20.0  # 1 s alone; a quadratic step would take minutes
    assert simulation.peak_live[0] == 128
