"""What simple models of the same tokens reach, to hold a trained model's perplexity against.

Owns that the comparison is fair: the same training tokens, and the same predicted tokens as the held-out
evaluation.
"""

from __future__ import annotations

from megalm.data.datasets import PreparedData
from megalm.data.windows import all_windows, predicted_tokens
from megalm.models.ngram import AddOneBigram, InterpolatedBigram, perplexity


def bigram_baselines(
    prepared: PreparedData, sequence: int, sequences: int | None = None, rows: str = "stream"
) -> dict[str, float]:
    """Return the held-out perplexities {"add_one", "interpolated"} of bigram models of the training split.

    They predict what a model with windows of `sequence` tokens, cut as `rows` says, predicts in the first `sequences`
    (None: all) of them. Raises DataError if there is nothing to predict.
    """
    validation = prepared.validation
    labels = predicted_tokens(all_windows(validation, sequence, rows), sequences)
    predicted = validation.window(0, labels + 1)
    train, vocabulary = prepared.train.tokens, prepared.vocabulary
    return {
        "add_one": perplexity(AddOneBigram.fit(train, vocabulary), predicted),
        "interpolated": perplexity(InterpolatedBigram.fit(train, vocabulary), predicted),
    }
