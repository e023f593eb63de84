"""Batches and sequences that grow: what each step takes, in every layout, over a resume, after a rollback."""

from __future__ import annotations

from itertools import accumulate, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.bench.plan import Point, make_plan
from megalm.config.checks import check_world
from megalm.config.ramps import batch_at, ramp_steps, samples_before, sequence_at, sequence_steps, steps_for
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.train.metrics_file import read_metrics
from tests.end_to_end.workplace import make_workplace, megalm
from tests.parity.cases import misses
from tests.parity.harness import Case, run_case, steps_data
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerPool

GROWING: dict[str, Any] = {
    "train.global_batch": 16, "batch_ramp.start": 4, "batch_ramp.increment": 8, "batch_ramp.every": 2,
    "sequence_warmup.start": 4, "sequence_warmup.every": 3, "model.dropout": 0.1,
}  # fmt: skip
"""Steps of 4, 4, 12, 12, 16 ... sequences, cut into rows of 4, 4, 4, 8, 8, 8, 16 ... tokens."""


def growing(**sections: Any) -> RunConfig:
    """Return a recipe of the batches 2, 2, 2, 6, 6, 6, 8 ... and the lengths 4, 4, 8, 8, 16 ..."""
    ramps = {
        "train": {"steps": 100, "global_batch": 8},
        "batch_ramp": {"start": 2, "increment": 4, "every": 3},
        "sequence_warmup": {"start": 4, "every": 2},
    }
    return small_recipe(**{name: {**ramps.get(name, {}), **sections.get(name, {})} for name in {*ramps, *sections}})


def test_each_step_has_its_batch_and_its_length() -> None:
    config = growing()
    assert [batch_at(config, step) for step in range(8)] == [2, 2, 2, 6, 6, 6, 8, 8]
    assert [sequence_at(config, step) for step in range(6)] == [4, 4, 8, 8, 16, 16]
    assert (ramp_steps(config), sequence_steps(config)) == (6, 4)
    plain = small_recipe()
    assert batch_at(plain, 0) == 4 and samples_before(plain, 7) == 28 and ramp_steps(plain) == 0
    assert sequence_at(plain, 0) == 16 and sequence_steps(plain) == 0


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.integers(1, 40), st.integers(0, 300))
def test_samples_and_steps_are_counted_as_they_are_taken(
    start: int, increment: int, every: int, more: int, samples: int
) -> None:
    config = small_recipe(
        train={"steps": 10**6, "global_batch": start + more, "micro_batch": 1},
        batch_ramp={"start": start, "increment": increment, "every": every},
    )
    taken = [size for _, size, _ in islice(steps_data(config), 320)]
    assert [batch_at(config, step) for step in range(320)] == taken
    assert [samples_before(config, step) for step in range(321)] == [*accumulate(taken, initial=0)]
    assert steps_for(config, samples) == next(n for n in range(321) if sum(taken[:n]) >= samples)


def test_a_length_in_tokens_counts_small_batches() -> None:
    """3 x 2, 3 x 6 and then 8 sequences a step: 30 of them take 7 steps, not 4."""
    assert growing(train={"steps": None, "tokens": 30 * 16}).steps == 7
    assert growing(train={"steps": None, "tokens": 33 * 16}).steps == 8
    assert growing(train={"steps": None, "epochs": 3}).with_windows(10).steps == 7


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"batch_ramp": {"every": None}}, "batch_ramp.start=2 does not say after how many steps it grows; set batch_r"),
        ({"batch_ramp": {"start": 8}}, "batch_ramp.start=8 is not below train.global_batch=8, to which it grows"),
        ({"batch_ramp": {"start": 3}}, "batch_ramp.start=3 is not divisible by train.micro_batch=2"),
        ({"batch_ramp": {"start": None}}, "batch_ramp.every=3 has no effect without batch_ramp.start; leave it out"),
        ({"train": {"steps": 6}}, "batch_ramp reaches train.global_batch=8 after 6 steps, which is not before the end"),
        ({"sequence_warmup": {"start": 5}}, "start=5 does not become model.sequence=16 by doubling; use 8, 4, 2, 1"),
        ({"sequence_warmup": {"start": 16}}, "sequence_warmup.start=16 does not become model.sequence=16 by doubling"),
        ({"sequence_warmup": {"every": None}}, "sequence_warmup.start=4 does not say after how many steps it grows"),
        ({"sequence_warmup": {"every": 50}}, "reaches model.sequence=16 after 100 steps, which is not before the end"),
        (
            {"parallel": {"tensor": 4, "sequence": True}, "sequence_warmup": {"start": 2}, "model": {"heads": 4}},
            "sequence_warmup.start=2 is not divisible by parallel.tensor=4",
        ),
        ({"model": {"sequence": 15}, "sequence_warmup": {"start": 7}}, "leave it out: an odd number has no half"),
    ],
)
def test_what_cannot_grow_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        growing(**sections)
    assert said in str(caught.value)


def test_every_batch_divides_over_the_ranks() -> None:
    assert check_world(growing(train={"micro_batch": 1}), 2) == 2
    with pytest.raises(ConfigError, match=r"batch_ramp.start=2 is not divisible by train.micro_batch=1 x 4 .* use 4 "):
        check_world(growing(train={"micro_batch": 1}), 4)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, GROWING),
        Case(2, 1, 2, {**GROWING, "parallel.sequence": True, "train.recompute": "full"}),
        Case(2, 2, 1, {**GROWING, "zero.stage": 2, "parallel.schedule": "gpipe"}),
        Case(1, 2, 2, {**GROWING, "zero.stage": 3, "model.position": "alibi"}),
        Case(2, 2, 2, {**GROWING, "zero.stage": 1, "model.dropout": 0.0, "model.document_mask": True}),
    ],
    ids=lambda case: f"{case.layout}",
)
def test_every_layout_computes_what_one_process_does(pool: WorkerPool, case: Case) -> None:
    difference, _ = run_case(pool, case, 8)
    assert not misses(difference, "fp64")


def test_a_run_is_resumed_and_goes_back_where_it_is_in_its_growth(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = make_workplace(tmp_path_factory.mktemp("ramps") / "place")
    settings = (
        "train.steps=12", "train.global_batch=8", "batch_ramp.start=2", "batch_ramp.every=2",
        "sequence_warmup.start=4", "sequence_warmup.every=3", "checkpoint.every=5",
    )  # fmt: skip

    def records(run: str, *more: str) -> list[dict[str, float]]:
        done = megalm(place, "train", "recipe.yaml", *settings, f"run.dir={run}", *more)
        assert done.returncode == 0, done.stderr
        kept = ("step", "tokens", "train/loss", "train/global_batch", "train/sequence", "optim/grad_norm")
        lines = [record for record in read_metrics(place / run / "metrics.jsonl") if "train/loss" in record]
        return [{key: line[key] for key in kept} for line in lines]

    whole = records("whole")
    batches = [2, 2, 4, 4, 6, 6, 8, 8, 8, 8, 8, 8]
    assert [line["train/global_batch"] for line in whole] == batches
    assert [line["train/sequence"] for line in whole] == [4, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16, 16]
    assert [line["tokens"] for line in whole] == [16 * sum(batches[: n + 1]) for n in range(12)]
    for stop in (4, 7):
        records("parts", f"train.stop_at={stop}")
    assert records("parts") == whole, "bit for bit"
    records("other", "train.stop_at=4", "parallel.tensor=2")
    other = records("other", "parallel.pipeline=2", "train.micro_batch=1")
    assert [line["train/loss"] for line in other] == pytest.approx([line["train/loss"] for line in whole], rel=1e-5)
    changed = megalm(place, "train", "recipe.yaml", *settings, "run.dir=whole", "sequence_warmup.every=2")
    assert changed.returncode == 2 and "sequence_warmup.every" in changed.stderr, changed.stderr


def test_points_of_a_scaling_run_do_not_grow(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = make_workplace(tmp_path_factory.mktemp("points") / "place")
    recipe = place / "grows.yaml"
    recipe.write_text("base: recipe.yaml\nbatch_ramp: {start: 2, every: 3}\nsequence_warmup: {start: 4, every: 2}\n")
    _, (config,) = make_plan(str(recipe), [], [Point(1, 0)], "strong", 10, place / "out")
    assert config.batch_ramp.start is None and config.sequence_warmup.start is None
