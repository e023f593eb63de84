"""The bigram baselines predict exactly the tokens that a model's held-out evaluation predicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalm.data.corpus import CORPORA
from megalm.data.datasets import PreparedData, prepare
from megalm.data.loader import HeldOut, held_out_batches
from megalm.data.windows import all_windows
from megalm.evaluation.baselines import bigram_baselines
from megalm.models.ngram import AddOneBigram, InterpolatedBigram


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    out = tmp_path_factory.mktemp("data") / "topics"
    return prepare(CORPORA.get("topics")(), out, vocabulary=1024, held_out=0.2)


@pytest.mark.parametrize("sequences", [None, 1, 7, 10**6])
def test_baselines_predict_the_labels_of_the_held_out_batches(topics: PreparedData, sequences: int | None) -> None:
    held_out = HeldOut(topics.validation, all_windows(topics.validation, 32, "stream"), sequences)
    pairs = np.concatenate(
        [
            (batch.tokens_BT * topics.vocabulary + batch.labels_BT)[batch.loss_mask_BT].numpy()
            for batch in held_out_batches(held_out, 4, 0, 1)
        ]
    )
    found = bigram_baselines(topics, 32, sequences)
    for name, kind in [("add_one", AddOneBigram), ("interpolated", InterpolatedBigram)]:
        model = kind.fit(topics.train.tokens, topics.vocabulary)
        expected = np.exp(-np.log(model.probabilities(pairs)).mean())
        assert found[name] == pytest.approx(expected, rel=1e-12)


def test_on_real_text_interpolation_beats_add_one(topics: PreparedData) -> None:
    found = bigram_baselines(topics, 128)
    assert 20 < found["interpolated"] < found["add_one"] / 2 < 500


def test_baselines_learn_from_the_training_split_only(topics: PreparedData, tmp_path: Path) -> None:
    swapped = PreparedData(topics.path, topics.description, topics.validation, topics.validation)
    assert bigram_baselines(swapped, 128)["interpolated"] < bigram_baselines(topics, 128)["interpolated"] / 2
