"""A run that goes on with another recipe: what may be otherwise is told, samples go on in order, lengths hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.checkpoint.names import find_checkpoints
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.ramps import batch_at
from megalm.errors import CheckpointError, ConfigError
from megalm.train.continuing import changes, continued, progress_of
from megalm.train.metrics_file import read_events, read_metrics
from megalm.train.trainer import TrainState
from tests.end_to_end.workplace import make_workplace, megalm
from tests.train.recipes import small_recipe

HERE = Path("run/checkpoints/step-00000010")


def of_tokens(sequences: int, **sections: Any) -> Any:
    train = {"steps": None, "tokens": 16 * sequences, **sections.pop("train", {})}
    return small_recipe(train=train, **sections)


def test_a_length_in_tokens_counts_the_batches_that_were() -> None:
    """Ten steps of 4 sequences, then of 8: 400 sequences are 10 steps and 45 more, not 50."""
    done = TrainState(step=10, samples=40, planned=40)
    whole = of_tokens(400, train={"global_batch": 8})
    assert continued(whole, done, HERE).steps == 55
    later = TrainState(step=20, samples=120, planned=120)
    assert continued(whole, later, HERE).steps == 55, "started once more"
    assert continued(of_tokens(401, train={"global_batch": 8}), done, HERE).steps == 56
    back = TrainState(step=20, samples=500, planned=120)  # a rollback passed over samples: as many steps
    assert continued(whole, back, HERE).steps == 55


def test_a_length_stays_what_it_was_where_batches_do() -> None:
    for recipe in (of_tokens(402), small_recipe(), of_tokens(402, batch_ramp={"start": 2, "every": 3})):
        planned = sum(batch_at(recipe, step) for step in range(10))
        assert continued(recipe, TrainState(step=10, samples=planned, planned=planned), HERE) is recipe


def test_a_ramp_that_is_begun_or_changed_goes_on_by_its_steps() -> None:
    recipe = of_tokens(100, batch_ramp={"start": 2, "every": 20}, train={"global_batch": 4})
    done = TrainState(step=10, samples=40, planned=40)
    config = continued(recipe, done, HERE)
    batches = [batch_at(config, step) for step in range(10, config.steps)]
    assert batches == [2] * 10 + [4] * 10 and sum(batches) == 60


def test_a_length_that_is_behind_the_run_is_refused() -> None:
    done = TrainState(step=10, samples=40, planned=40)
    with pytest.raises(
        ConfigError, match=r"train.steps=7 is less than the 10 steps that run/checkpoints/step-00000010"
    ):
        continued(small_recipe(train={"steps": 7}), done, HERE)
    assert continued(of_tokens(20, train={"global_batch": 4}), done, HERE).steps == 10, "done, as tokens were enough"


def holding(progress: Any) -> Any:
    return SimpleNamespace(directory=HERE, state={"progress": progress})


def test_progress_of_older_checkpoints_and_of_newer_ones() -> None:
    assert progress_of(holding({"step": 3, "samples": 12})).planned == 12
    assert progress_of(holding({"step": 3, "samples": 12, "planned": 8})).planned == 8
    with pytest.raises(CheckpointError, match=r"state\.json: its progress has warp, of a newer megalm"):
        progress_of(holding({"step": 3, "samples": 12, "warp": 9}))
    for nothing in (None, [], {"step": 3}):
        with pytest.raises(CheckpointError, match=r"state\.json: holds no progress of a run; delete this checkpoint"):
            progress_of(holding(nothing))


def test_every_change_is_told_with_both_values() -> None:
    before = small_recipe().model_dump(mode="json")
    other = small_recipe(optim={"lr": 1e-4}, parallel={"partition": [2]}, run={"dir": "elsewhere"})
    now = other.model_dump(mode="json")
    assert changes(before, now) == {"optim.lr": "0.001 -> 0.0001", "parallel.partition": "null -> [2]"}
    assert changes(now, before)["parallel.partition"] == "[2] -> null"
    del before["optim"]["weight_decay"], before["evaluate"]
    before["optim"]["gone"] = 1
    assert changes(before, small_recipe().model_dump(mode="json")) == {}, "defaults, and keys that are no more"


def test_a_run_goes_on_with_other_batches_and_rates_and_tells_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = make_workplace(tmp_path_factory.mktemp("course") / "place")
    length = ("train.steps=null", "train.tokens=1280")  # 80 sequences

    def train(*more: str) -> Any:
        return megalm(place, "train", "recipe.yaml", *length, "checkpoint.every=4", *more)

    assert train("train.stop_at=4").returncode == 0
    newest = find_checkpoints(place / "run" / "checkpoints")[0]
    course = ("train.global_batch=8", "optim.lr=1e-3", "train.micro_batch=4", "lr_schedule.kind=constant")
    second = train(*course, "train.stop_at=7")
    assert second.returncode == 0, second.stderr
    said = 'SETTINGS CHANGED  lr_schedule.kind "cosine" -> "constant"  optim.lr 0.003 -> 0.001'
    assert said in second.stdout and f"resuming {newest.relative_to(place)} at step 4" in second.stdout
    damaged = find_checkpoints(place / "run" / "checkpoints")[0]
    (damaged / "state.json").write_text("{}")
    third = train(*course)
    assert third.returncode == 0, third.stderr
    events = read_events(place / "run" / "metrics.jsonl")
    assert [(event["step"], event["event"]) for event in events] == [
        (4, "settings changed"), (4, "DAMAGED CHECKPOINT PASSED OVER"), (4, "settings changed")
    ]  # fmt: skip
    assert events[0]["train.global_batch"] == "4 -> 8" and events[0]["train.stop_at"] == "4 -> 7"
    assert str(damaged.relative_to(place)) in events[1]["reason"] and damaged.name in third.stdout
    records = [line for line in read_metrics(place / "run" / "metrics.jsonl") if "train/loss" in line]
    assert [line["tokens"] // 16 for line in records] == [4, 8, 12, 16, *range(24, 81, 8)]
    assert [line["optim/lr"] for line in records[4:]] == [1e-3] * 8
    reader = CheckpointReader(find_checkpoints(place / "run" / "checkpoints")[0])
    assert reader.step == 12 and reader.state["progress"]["samples"] == 80
    assert reader.state["config"]["train"]["tokens"] == 1280 and reader.state["metrics"]["train"]["step"] == 12
    reader.close()
    short = megalm(place, "train", "recipe.yaml", "train.steps=5")
    assert short.returncode == 2 and "train.steps=5 is less than the 12 steps that" in short.stderr
    other = train("model.hidden=32")
    assert other.returncode == 2 and "model.hidden=16 there, 32 here" in other.stderr
