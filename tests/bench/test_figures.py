"""What is made of the lines of a point's metrics."""

from __future__ import annotations

import pytest

from megalm.bench.figures import efficiency, figures_of, measured, percentile, warmup_steps


def lines(step_s: list[float], **parts: float) -> list[dict[str, float]]:
    return [
        {"step": step, "train/loss": 2.0, "time/step_s": seconds, **{f"time/{name}_s": x for name, x in parts.items()}}
        for step, seconds in enumerate(step_s, start=1)
    ]


@pytest.mark.parametrize(("steps", "dropped"), [(5, 2), (10, 2), (11, 3), (50, 10)])
def test_a_fifth_of_the_steps_and_at_least_two_are_warm_up(steps: int, dropped: int) -> None:
    assert warmup_steps(steps) == dropped


def test_only_training_lines_after_the_warm_up_count() -> None:
    records = [*lines([9.0, 9.0, 1.0, 2.0, 3.0]), {"step": 5, "evaluate/loss": 1.0}]
    assert [record["time/step_s"] for record in measured(records, 5)] == [1.0, 2.0, 3.0]


def test_figures_are_medians_and_percentiles() -> None:
    found = figures_of(lines([float(n) for n in range(1, 12)]), tokens_per_step=120)
    assert (found.step_s, found.step_low_s, found.step_high_s) == (6.0, 2.0, 10.0)
    assert (found.tokens_per_s, found.tokens_low_per_s, found.tokens_high_per_s) == (20.0, 12.0, 60.0)
    assert found.measured_steps == 11
    assert (found.mfu, found.peak_bytes, found.parts_s) == (None, None, None)


def test_memory_is_the_most_and_mfu_the_median() -> None:
    records = [
        {**line, "perf/mfu": mfu, "memory/peak_bytes": peak}
        for line, mfu, peak in zip(lines([1.0, 1.0, 1.0]), (0.1, 0.2, 0.9), (5, 7, 6), strict=True)
    ]
    found = figures_of(records, 1)
    assert (found.mfu, found.peak_bytes) == (0.2, 7)


def test_parts_are_of_the_middle_half_and_add_up() -> None:
    records = lines([1.0, 1.0, 1.2, 1.0, 1.0, 1.0, 1.0, 30.0], data=0.1, compute=0.5, communication=0.3)
    records[-1]["time/communication_s"] = 29.0  # a late step, which is not of the middle half
    found = figures_of(records, 1)
    assert found.parts_s is not None
    assert found.parts_s == pytest.approx({"data": 0.1, "compute": 0.5, "communication": 0.3, "other": 0.1})
    assert sum(found.parts_s.values()) == pytest.approx(1.0)


def test_parts_that_only_some_runs_measure_are_left_out() -> None:
    found = figures_of(lines([1.0, 1.0, 1.0, 1.0], data=0.25), 1)
    assert found.parts_s == pytest.approx({"data": 0.25, "other": 0.75})
    over = figures_of(lines([1.0, 1.0, 1.0, 1.0], data=0.7, compute=0.7), 1)
    assert over.parts_s is not None and over.parts_s["other"] == 0.0


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3.0], 90) == 3.0
    assert percentile([2.0, 1.0], 50) == 1.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 10) == pytest.approx(1.4)


def test_efficiency_is_the_same_measure_for_strong_and_weak_scaling() -> None:
    # strong: twice the ranks, 1.6 times as fast a step of the same batch
    assert efficiency(160.0, 4, 100.0, 2) == pytest.approx(1.6 / 2)
    # weak: 40 tokens/s a rank against 50
    assert efficiency(320.0, 8, 100.0, 2) == pytest.approx(40 / 50)
