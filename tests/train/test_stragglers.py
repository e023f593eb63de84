"""Who is slow is told by the time that it does not wait, and healthy ranks are left alone.

With MEGALM_TEST_REPEATS set these are 1,000 healthy steps instead of 250.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.launch.local import run_workers
from megalm.train.metrics_file import read_events, read_metrics
from megalm.train.stragglers import (
    RANK_TIMES_FILE,
    RankTime,
    SlowRank,
    slow_ranks,
    slow_throughout,
    summary,
)
from megalm.train.trainer import StepTimes
from tests.end_to_end.workplace import ROOT, make_workplace

CONTROL_GROUPS = Path("/sys/fs/cgroup/cpu")
SLOW_FROM = 45


def times(*busy_s: float, error_s: float = 0.001) -> list[RankTime]:
    return [RankTime(0.01, busy, 0.5, error_s) for busy in busy_s]


def test_a_rank_a_tenth_above_the_median_of_its_stage_is_named_the_slowest_first() -> None:
    found = slow_ranks(times(1.0, 1.02, 1.13, 0.99, 1.5), [0] * 5)
    assert [slow.rank for slow in found] == [4, 2]
    assert found[1] == SlowRank(2, 1.14, 1.03, "compute")
    assert not slow_ranks(times(1.0, 1.02, 1.09, 0.99), [0] * 4)
    assert [slow.rank for slow in slow_ranks(times(1.0, 1.3), [0] * 2)] == [1], "two ranks: 13% above their middle"
    assert not slow_ranks(times(1.0, 1.12), [0] * 2)


def test_stages_may_differ_and_a_stage_of_one_rank_has_no_peers() -> None:
    assert not slow_ranks(times(1.0, 1.0, 2.0, 2.0), [0, 0, 1, 1])
    assert not slow_ranks(times(1.0, 5.0), [0, 1])
    assert [slow.rank for slow in slow_ranks(times(1.0, 1.0, 2.0, 2.6), [0, 0, 1, 1])] == [3]


def test_a_rank_must_be_slow_in_both_halves() -> None:
    slow, other, none = times(1.0, 1.5, 1.0), times(1.4, 1.0, 1.0), times(1.0, 1.0, 1.0)
    assert [one.rank for one in slow_throughout(slow, slow, [0] * 3)] == [1]
    for first, second in ((slow, none), (none, slow), (other, slow)):
        assert not slow_throughout(first, second, [0] * 3)


def test_what_takes_it_longer_is_said() -> None:
    ranks = [RankTime(data, 1.0, 0.5, 0.001) for data in (0.1, 0.6, 0.1)]
    assert [(slow.rank, slow.part) for slow in slow_ranks(ranks, [0] * 3)] == [(1, "data")]


def test_steps_that_vary_much_say_little() -> None:
    assert slow_ranks(times(1.0, 1.0, 1.2, error_s=0.04), [0] * 3)
    assert not slow_ranks(times(1.0, 1.0, 1.2, error_s=0.06), [0] * 3)


def test_a_summary_holds_medians_and_their_error() -> None:
    draw = random.Random(3)
    medians = []
    for _ in range(2000):
        medians.append(summary([StepTimes(0.5, 9.0, draw.gauss(1.0, 0.1)) for _ in range(20)]))
    mean = sum(own.busy_s for own in medians) / len(medians)
    spread = (sum((own.busy_s - mean) ** 2 for own in medians) / len(medians)) ** 0.5
    assert mean == pytest.approx(1.5, rel=0.01)
    assert sum(own.error_s for own in medians) / len(medians) == pytest.approx(spread, rel=0.15)
    hiccup = summary([StepTimes(0.0, 9.0, compute_s) for compute_s in [1.0] * 19 + [60.0]])
    assert (hiccup.compute_s, hiccup.error_s) == (1.0, 0.0)


@pytest.fixture
def slow_group(tmp_path: Path) -> Iterator[Path]:
    """Give a control group whose processes get a fifth of one processor, in slices of milliseconds."""
    group = CONTROL_GROUPS / f"megalm-{tmp_path.name}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("10000")
        (group / "cpu.cfs_quota_us").write_text("2000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def train(place: Path, patch: pytest.MonkeyPatch, world: int, fault: tuple[str, str, str], *overrides: str) -> Path:
    patch.chdir(make_workplace(place))
    patch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "tests.watchdog.faulty", *fault, "recipe.yaml", "checkpoint.every=0", *overrides]
    assert (
        run_workers([*command, "evaluate.every=0", "evaluate.sequences=4", "log.every=20"], world, place / "logs") == 0
    )
    return place / "run" / "metrics.jsonl"


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_a_rank_slowed_by_a_quota_of_its_processor_is_named_within_twenty_steps(
    tmp_path: Path, slow_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_GROUP", str(slow_group))
    fault = ("slow", "3", str(SLOW_FROM))
    size = ("model.hidden=256", "train.global_batch=64", "train.micro_batch=32")  # computes longer than it is halted
    metrics = train(tmp_path, monkeypatch, 4, fault, "train.steps=80", "parallel.tensor=2", *size)
    events = read_events(metrics)
    assert events and {event["rank"] for event in events} == {3}, events
    assert (events[0]["event"], events[0]["part"]) == ("slow rank", "compute")
    assert SLOW_FROM < events[0]["step"] <= SLOW_FROM + 20
    assert events[0]["ratio"] > 1.5
    names, *rows = [line.split("\t") for line in (metrics.parent / RANK_TIMES_FILE).read_text().splitlines()]
    assert names == ["step", "rank", "host", "stage", "data_s", "compute_s", "communication_s"]
    assert [row[:2] for row in rows] == [["80", str(rank)] for rank in range(4)]
    assert max(rows, key=lambda row: float(row[5])) == rows[3] == min(rows, key=lambda row: float(row[6]))


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_healthy_steps_name_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 1000 if "MEGALM_TEST_REPEATS" in os.environ else 250
    fault = ("stop", "0", "9999")
    metrics = train(tmp_path, monkeypatch, 2, fault, f"train.steps={steps}", "parallel.tensor=2")
    assert not read_events(metrics), "one of three runs must be without: other work may slow a rank for real"
    for record in read_metrics(metrics):
        if "train/loss" in record and record["step"] > 1:
            parts = sum(record[f"time/{name}_s"] for name in ("data", "compute", "communication"))
            assert parts == pytest.approx(record["time/step_s"], rel=0.35), record
