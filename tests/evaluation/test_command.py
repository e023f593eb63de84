"""What `megalm evaluate` answers and refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megalm.data.corpus import Document, MemoryCorpus
from megalm.data.datasets import open_prepared, prepare
from megalm.errors import ConfigError, DataError
from megalm.evaluation.command import evaluate
from tests.trained_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data and a checkpoint."""
    return make_run(tmp_path_factory.mktemp("evaluate"))


def test_all_held_out_tokens_but_the_first_are_predicted(run: Path) -> None:
    data = open_prepared(run.parent / "data")
    answer = evaluate(str(run))
    assert answer is not None
    assert (answer["step"], answer["split"]) == (5, "validation")
    assert answer["tokens"] == len(data.validation) - 1
    assert answer["perplexity"] == pytest.approx(math.exp(answer["loss"]))
    # All text but what the first token, an end of text of no bytes, stands for.
    bits = answer["loss"] * answer["tokens"] / math.log(2.0)
    assert answer["bits_per_byte"] == pytest.approx(bits / data.description.validation.bytes)


def test_split_and_number_of_sequences_can_be_chosen(run: Path) -> None:
    few = evaluate(str(run), ["evaluate.sequences=2", "train.micro_batch=1"])
    other = evaluate(str(run), ["evaluate.sequences=2"], "train")
    assert few is not None and other is not None
    assert few["tokens"] == other["tokens"] == 32
    assert few["loss"] != other["loss"]


def test_data_of_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    texts = [f"an other text {number} altogether " * 4 for number in range(30)]
    prepare(MemoryCorpus("other", tuple(Document("a", text) for text in texts)), tmp_path / "other", vocabulary=280)
    with pytest.raises(DataError, match="--tokenizer"):
        evaluate(str(run), [f"data.path={tmp_path / 'other'}"])


def test_what_training_fixed_cannot_be_overridden(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers=1 cannot be set for a trained model"):
        evaluate(str(run), ["model.layers=1"])
