"""One run trained on four processes: stopped and gone on with, evaluated and continued in other layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.train.metrics_file import read_metrics
from tests.end_to_end.workplace import make_workplace, megalm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SPLIT = (
    "parallel.tensor=2", "parallel.pipeline=2", "zero.stage=1",
    "train.steps=6", "evaluate.every=3", "optim.ema_decay=0.9", "data.rows=documents",
)  # fmt: skip
PROMPT = "the north wind"


def succeed(place: Path, *arguments: str) -> str:
    """Return what the command line prints."""
    done = megalm(place, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a workplace in which `run` has been trained to its end."""
    workplace = make_workplace(tmp_path_factory.mktemp("layouts") / "workplace")
    succeed(workplace, "train", "recipe.yaml", *SPLIT)
    return workplace


def logged(run: Path) -> list[dict[str, float]]:
    """Return what does not depend on the clock of each line of metrics."""
    keys = ("step", "tokens", "train/loss", "optim/lr", "optim/grad_norm", "evaluate/loss", "evaluate/ema_loss")
    return [{key: record[key] for key in keys if key in record} for record in read_metrics(run / "metrics.jsonl")]


def test_the_run_learned_and_logged_each_step_once(place: Path) -> None:
    records = logged(place / "run")
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "evaluate/loss" in record] == [3, 6]
    assert losses[-1] < losses[0]
    assert all((place / "run" / "logs" / f"rank-{rank}.log").exists() for rank in range(4))
    assert "held-out loss" in (place / "run" / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("options", "logged_as"),
    [((), "evaluate/"), (("parallel.tensor=2",), "evaluate/"), (("parallel.tensor=2", "--ema"), "evaluate/ema_")],
    ids=["one process", "tensor 2", "averaged weights"],
)
def test_evaluation_gives_what_training_logged(place: Path, options: tuple[str, ...], logged_as: str) -> None:
    answer = json.loads(succeed(place, "evaluate", "run", *options, "--json"))
    last = read_metrics(place / "run" / "metrics.jsonl")[-1]
    assert answer["step"] == last["step"] == 6
    assert answer["loss"] == pytest.approx(last[f"{logged_as}loss"], rel=1e-6)
    assert answer["bits_per_byte"] == pytest.approx(last[f"{logged_as}bits_per_byte"], rel=1e-6)
    assert last["evaluate/ema_loss"] > last["evaluate/loss"], "the average lags behind while the model learns fast"


def test_a_sample_of_the_averaged_weights_is_another(place: Path) -> None:
    command = ("generate", "run", f"--prompt={PROMPT}", "--tokens=24")
    averaged = succeed(place, *command, "--ema")
    assert averaged != succeed(place, *command)
    assert succeed(place, *command, "--ema", "parallel.pipeline=2") == averaged


def test_greedy_text_is_the_same_in_one_process_and_two_stages(place: Path) -> None:
    command = ("generate", "run", f"--prompt={PROMPT}", "--temperature=0", "--tokens=24")
    alone = succeed(place, *command)
    assert alone.startswith(PROMPT) and len(alone) > len(PROMPT) + 5
    assert succeed(place, *command, "parallel.pipeline=2") == alone


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(place: Path) -> None:
    succeed(place, "train", "recipe.yaml", *SPLIT, "run.dir=stopped", "train.stop_at=3")
    assert [record["step"] for record in logged(place / "stopped")] == [1, 2, 3, 3]
    said = succeed(place, "train", "recipe.yaml", *SPLIT, "run.dir=stopped")
    assert "resuming stopped/checkpoints/step-00000003 at step 3" in said
    assert logged(place / "stopped") == logged(place / "run")


def test_a_run_goes_on_with_more_and_fewer_data_ranks(place: Path) -> None:
    """The same batches in the same order: three data ranks do not divide them, and fill them up."""
    elastic = ("train", "recipe.yaml", *SPLIT, "parallel.tensor=1", "parallel.pipeline=1", "run.dir=elastic")
    succeed(place, *elastic, "--nproc=2", "train.stop_at=2")
    refused = megalm(place, *elastic, "--nproc=3", "train.stop_at=4")
    assert refused.returncode == 2 and "or train.pad_batch=true" in refused.stderr, refused.stderr
    said = succeed(place, *elastic, "--nproc=3", "train.stop_at=4", "train.pad_batch=true")
    assert "filling" in said and "rows of a batch, which have no loss" in said
    succeed(place, *elastic, "--nproc=1")
    steps = {record["step"]: record for record in logged(place / "elastic") if "train/loss" in record}
    for record in logged(place / "run"):
        if "train/loss" in record:
            found = steps[record["step"]]
            assert found.keys() == record.keys() and found["tokens"] == record["tokens"]
            assert found["train/loss"] == pytest.approx(record["train/loss"], rel=1e-5)
            assert found["optim/grad_norm"] == pytest.approx(record["optim/grad_norm"], rel=1e-4)


def test_a_run_goes_on_with_its_rows_divided(place: Path) -> None:
    context = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.context=2", "run.dir=divided")
    succeed(place, "train", "recipe.yaml", *SPLIT, "run.dir=divided", "train.stop_at=3")
    said = succeed(place, "train", "recipe.yaml", *SPLIT, *context, "--nproc=4")
    assert "resuming divided/checkpoints/step-00000003 at step 3" in said
    assert "tensor 1 x pipeline 1 x context 2 x data 2" in said
    for record, expected in zip(logged(place / "divided"), logged(place / "run"), strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
    answers = [
        json.loads(succeed(place, "evaluate", "divided", *how, "--json"))
        for how in ((), ("parallel.context=2", "parallel.context_attention=ulysses"))
    ]
    assert answers[0]["loss"] == pytest.approx(answers[1]["loss"], rel=1e-6)
    command = ("generate", "divided", f"--prompt={PROMPT}", "--temperature=0", "--tokens=8")
    text = succeed(place, *command)
    assert text.startswith(PROMPT) and succeed(place, *command, "parallel.context=2") == text


def test_a_folded_run_that_goes_on_interleaved_learns_what_one_process_does(place: Path) -> None:
    recipe = ("recipe.yaml", "model.layers=4", "train.steps=6", "evaluate.every=3")
    succeed(place, "train", *recipe, "run.dir=alone")
    succeed(
        place, "train", *recipe, "parallel.pipeline=2", "parallel.schedule=zb-v", "run.dir=parts", "train.stop_at=3"
    )
    chunks = ("parallel.schedule=interleaved", "parallel.virtual_stages=2")
    said = succeed(place, "train", *recipe, "parallel.pipeline=2", *chunks, "zero.stage=1", "run.dir=parts")
    assert "resuming parts/checkpoints/step-00000003 at step 3" in said
    alone, parts = logged(place / "alone"), logged(place / "parts")
    assert len(alone) == len(parts) == 8
    for one, other in zip(alone, parts, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    answer = json.loads(succeed(place, "evaluate", "parts", "--json"))
    assert answer["loss"] == pytest.approx(parts[-1]["evaluate/loss"], rel=1e-6)
