"""Bigram models of a token stream: what a trained model must beat to have learned more than pairs of tokens.

Owns counting and the two estimates. Which tokens are predicted is decided by `megalm.evaluation.baselines`.
Counts are sparse (sorted pairs), so memory follows the number of distinct pairs and not the vocabulary's
square; all probabilities are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 22  # pairs looked at in one go: about 200 MB at the most
HELD_OUT_EVERY = 20  # one block in so many of the training pairs is kept from counting, to fit the weights on
BLOCK = 4096
EM_ROUNDS = 50


@dataclass(frozen=True)
class BigramCounts:
    """How often each pair of tokens, and each token as a first and as a second, stands in a stream.

    `pairs`: int64 [distinct], first * vocabulary + second, ascending; `pair_counts`: int64 [distinct];
    `first_counts`, `second_counts`: int64 [vocabulary].
    """

    vocabulary: int
    pairs: NDArray[np.int64]
    pair_counts: NDArray[np.int64]
    first_counts: NDArray[np.int64]
    second_counts: NDArray[np.int64]

    @classmethod
    def empty(cls, vocabulary: int) -> BigramCounts:
        """Return the counts of no pairs."""
        assert 1 <= vocabulary < 1 << 31, f"vocabulary={vocabulary}: a pair must fit 62 bits"
        zeros = np.zeros(vocabulary, dtype=np.int64)
        return cls(vocabulary, zeros[:0], zeros[:0], zeros, zeros)

    def plus(self, pairs: NDArray[np.int64]) -> BigramCounts:
        """Return the counts with further pairs, int64 [any number] in any order, added."""
        distinct, counts = np.unique(pairs, return_counts=True)
        keys = np.concatenate([self.pairs, distinct])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        merged = np.concatenate([self.pair_counts, counts])[order]
        width = self.vocabulary
        return BigramCounts(
            width,
            keys[starts],
            np.add.reduceat(merged, starts) if len(starts) else merged,
            self.first_counts + np.bincount(pairs // width, minlength=width),
            self.second_counts + np.bincount(pairs % width, minlength=width),
        )

    def of_pairs(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how often each of `pairs` was counted."""
        if not len(self.pairs):
            return np.zeros(len(pairs), dtype=np.int64)
        places = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        return np.where(self.pairs[places] == pairs, self.pair_counts[places], 0)


class BigramModel(Protocol):
    """A distribution over the next token, given the last one."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""

    def probabilities(self, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return P(second | first) of each pair first * vocabulary + second."""


@dataclass(frozen=True)
class AddOneBigram:
    """P(b | a) = (c(a, b) + 1) / (c(a) + V): Laplace's rule of succession."""

    counts: BigramCounts

    @classmethod
    def fit(cls, tokens: NDArray[Any], vocabulary: int) -> AddOneBigram:
        """Count the pairs of a stream of token ids."""
        return cls(count_pairs(tokens, vocabulary))

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.counts.vocabulary

    def probabilities(self, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return P(second | first) of each pair."""
        contexts = self.counts.first_counts[pairs // self.vocabulary]
        return (self.counts.of_pairs(pairs) + 1) / (contexts + self.vocabulary)


@dataclass(frozen=True)
class InterpolatedBigram:
    """P(b | a) = w2 c(a, b) / c(a) + w1 c(b) / N + w0 / V, the weights depending on how often `a` was seen.

    The weights of each class of c(a) (0, 1, 2-3, 4-7, ...) are fitted by expectation maximization on training
    pairs that were not counted; then all training pairs are counted. Source: Jelinek and Mercer 1980.
    `weights`: float64 [classes, 3], in the order bigram, unigram, uniform; each row sums to 1.
    """

    counts: BigramCounts
    weights: NDArray[np.float64]

    @classmethod
    def fit(cls, tokens: NDArray[Any], vocabulary: int) -> InterpolatedBigram:
        """Count the pairs of a stream of token ids, and fit the weights on every twentieth block of it."""
        pairs = max(len(tokens) - 1, 1)
        block = max(1, min(BLOCK, pairs // (2 * HELD_OUT_EVERY)))
        counted, kept = BigramCounts.empty(vocabulary), BigramCounts.empty(vocabulary)
        for start, chunk in pair_chunks(tokens, vocabulary):
            blocks = np.arange(start, start + len(chunk)) // block
            is_kept = blocks % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            counted, kept = counted.plus(chunk[~is_kept]), kept.plus(chunk[is_kept])
        weights = fitted_weights(counted, kept)
        everything = counted.plus(np.repeat(kept.pairs, kept.pair_counts))
        return cls(everything, weights)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.counts.vocabulary

    def probabilities(self, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return P(second | first) of each pair."""
        classes, parts = estimates(self.counts, pairs)
        mixed: NDArray[np.float64] = (self.weights[classes] * parts).sum(axis=1)
        return mixed


def estimates(counts: BigramCounts, pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the class of each pair's context, int64 [pairs], and the three estimates, float64 [pairs, 3].

    A context that was never seen has no bigram estimate; its unigram estimate stands in, so that rows stay
    distributions.
    """
    first, second = np.divmod(pairs, counts.vocabulary)
    contexts = counts.first_counts[first]
    unigram = counts.second_counts[second] / max(1, int(counts.second_counts.sum()))
    bigram = np.where(contexts > 0, counts.of_pairs(pairs) / np.maximum(contexts, 1), unigram)
    uniform = np.full(len(pairs), 1 / counts.vocabulary)
    return context_classes(contexts), np.stack([bigram, unigram, uniform], axis=1)


def context_classes(contexts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of binary digits of each count: 0, then 1 for 1, 2 for 2-3, 3 for 4-7, ..."""
    return np.frexp(contexts.astype(np.float64))[1].astype(np.int64)


def fitted_weights(counted: BigramCounts, kept: BigramCounts) -> NDArray[np.float64]:
    """Return the weights float64 [64, 3] that make the `kept` pairs most likely, given the `counted` ones.

    A class of contexts without kept pairs gets the weights fitted to all of them.
    """
    classes, parts = estimates(counted, kept.pairs)
    times = kept.pair_counts.astype(np.float64)
    overall = _expectation_maximization(parts, times)
    weights = np.tile(overall, (64, 1))
    for number in np.unique(classes):
        chosen = classes == number
        weights[number] = _expectation_maximization(parts[chosen], times[chosen])
    return weights


def _expectation_maximization(parts: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mixture weights [3] for `parts` [pairs, 3] that occurred `times` [pairs]; all stay above 0."""
    weights = np.full(parts.shape[1], 1 / parts.shape[1])
    for _ in range(EM_ROUNDS):
        joint = parts * weights
        share = joint / joint.sum(axis=1, keepdims=True)
        expected = times @ share + 1
        weights = expected / expected.sum()
    return weights


def count_pairs(tokens: NDArray[Any], vocabulary: int) -> BigramCounts:
    """Return the counts of all neighbouring pairs of a stream of token ids."""
    counts = BigramCounts.empty(vocabulary)
    for _, pairs in pair_chunks(tokens, vocabulary):
        counts = counts.plus(pairs)
    return counts


def pair_chunks(tokens: NDArray[Any], vocabulary: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (number of the first pair, int64 pairs) of a stream of token ids, a bounded number at a time."""
    for start in range(0, len(tokens) - 1, CHUNK):
        chunk = np.asarray(tokens[start : start + CHUNK + 1]).astype(np.int64)
        assert int(chunk.max()) < vocabulary, f"token {int(chunk.max())} with a vocabulary of {vocabulary}"
        yield start, chunk[:-1] * vocabulary + chunk[1:]


def perplexity(model: BigramModel, tokens: NDArray[Any]) -> float:
    """Return exp of the mean negative log probability of every token of the stream but the first."""
    assert len(tokens) >= 2, f"{len(tokens)} tokens leave nothing to predict"
    total = 0.0
    for _, pairs in pair_chunks(tokens, model.vocabulary):
        total -= float(np.log(model.probabilities(pairs)).sum())
    return math.exp(total / (len(tokens) - 1))
