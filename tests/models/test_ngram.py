"""Bigram models against a few lines of plain Python, and against what a distribution must satisfy."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.models import ngram
from megalm.models.ngram import AddOneBigram, BigramCounts, InterpolatedBigram, count_pairs, perplexity

streams = st.lists(st.integers(0, 6), min_size=2, max_size=80).map(np.array)


def zipf_stream(length: int, vocabulary: int, seed: int) -> np.ndarray:
    """Return a first-order Markov chain, so that pairs carry information."""
    draw = np.random.default_rng(seed)
    follows = np.random.default_rng(99).integers(0, vocabulary, size=(vocabulary, 4))
    stream = [0]
    for choice, noise, token in zip(
        draw.integers(0, 4, length), draw.random(length), draw.zipf(1.5, length), strict=True
    ):
        stream.append(int(follows[stream[-1], choice]) if noise < 0.8 else int(min(token, vocabulary) - 1))
    return np.array(stream, dtype=np.uint16)


def all_pairs(vocabulary: int) -> np.ndarray:
    return np.arange(vocabulary**2, dtype=np.int64)


@settings(deadline=None, max_examples=100)
@given(train=streams, heldout=streams)
def test_add_one_perplexity_is_that_of_plain_counting(train: np.ndarray, heldout: np.ndarray) -> None:
    pairs = Counter(zip(train.tolist(), train.tolist()[1:], strict=False))
    firsts = Counter(train.tolist()[:-1])
    losses = [
        -math.log((pairs[a, b] + 1) / (firsts[a] + 7))
        for a, b in zip(heldout.tolist(), heldout.tolist()[1:], strict=False)
    ]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(AddOneBigram.fit(train, 7), heldout) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(stream=st.lists(st.integers(0, 6), min_size=2, max_size=200).map(np.array), chunk=st.integers(1, 30))
def test_counts_do_not_depend_on_the_size_of_chunks(stream: np.ndarray, chunk: int) -> None:
    whole = count_pairs(stream, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "CHUNK", chunk)
        parts = count_pairs(stream, 7)
        in_chunks = perplexity(InterpolatedBigram.fit(stream, 7), stream)
    for name in ("pairs", "pair_counts", "first_counts", "second_counts"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.pair_counts.sum() == len(stream) - 1
    assert in_chunks == pytest.approx(perplexity(InterpolatedBigram.fit(stream, 7), stream), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(stream=streams)
def test_probabilities_after_every_token_sum_to_one(stream: np.ndarray) -> None:
    for model in (AddOneBigram.fit(stream, 7), InterpolatedBigram.fit(stream, 7)):
        probabilities = model.probabilities(all_pairs(7))
        assert probabilities.dtype == np.float64 and (probabilities > 0).all()
        assert probabilities.reshape(7, 7).sum(axis=1) == pytest.approx(np.ones(7), rel=1e-12)


def test_in_the_end_all_training_pairs_are_counted_also_those_kept_for_the_weights() -> None:
    stream = zipf_stream(5000, 20, seed=1)
    fitted, whole = InterpolatedBigram.fit(stream, 20).counts, count_pairs(stream, 20)
    for name in ("pairs", "pair_counts", "first_counts", "second_counts"):
        assert np.array_equal(getattr(fitted, name), getattr(whole, name)), name


def test_interpolation_is_the_weighted_sum_of_its_three_estimates() -> None:
    stream = np.array([0, 1, 0, 2, 0, 1, 1])
    model = InterpolatedBigram.fit(stream, 3)
    weights = model.weights[2]  # token 0 was a context 3 times: the class of 2 and 3
    found = model.probabilities(np.array([0 * 3 + 1]))[0]
    assert found == pytest.approx(weights @ [2 / 3, 3 / 6, 1 / 3], rel=1e-12)
    assert model.weights.sum(axis=1) == pytest.approx(np.ones(len(model.weights)))


def test_fitted_weights_are_the_best_there_are_for_the_pairs_kept_from_counting() -> None:
    stream = zipf_stream(20_000, 50, seed=1).astype(np.int64)
    pairs = stream[:-1] * 50 + stream[1:]
    counted, kept = BigramCounts.empty(50).plus(pairs[:18_000]), BigramCounts.empty(50).plus(pairs[18_000:])
    weights = ngram.fitted_weights(counted, kept)
    classes, parts = ngram.estimates(counted, kept.pairs)
    largest = np.bincount(classes, kept.pair_counts).argmax()
    chosen = classes == largest

    def likelihood(mixture: np.ndarray) -> float:
        return float(kept.pair_counts[chosen] @ np.log(parts[chosen] @ mixture))

    fitted = likelihood(weights[largest])
    for one, other in permutations(range(3), 2):
        moved = weights[largest].copy()
        step = min(0.02, moved[one] / 2)
        moved[[one, other]] += [-step, step]
        assert moved.sum() == pytest.approx(1)
        assert likelihood(moved) <= fitted + 1.0, "one pseudo-count may cost a little"


def test_pairs_beat_add_one_and_both_beat_chance_on_a_markov_chain() -> None:
    train, heldout = zipf_stream(30_000, 200, seed=1), zipf_stream(5_000, 200, seed=2)
    add_one = perplexity(AddOneBigram.fit(train, 200), heldout)
    interpolated = perplexity(InterpolatedBigram.fit(train, 200), heldout)
    assert interpolated < add_one < 200
    assert interpolated < 15  # the chain's own entropy is about e^2.2


def test_a_uniform_stream_has_the_perplexity_of_its_vocabulary() -> None:
    draw = np.random.default_rng(0)
    model = InterpolatedBigram.fit(draw.integers(0, 100, 50_000), 100)
    assert perplexity(model, draw.integers(0, 100, 20_000)) == pytest.approx(100, rel=0.02)


def test_contexts_never_seen_and_large_vocabularies_are_fine() -> None:
    train, heldout = np.array([0, 1, 2] * 50), np.array([150_000, 3, 1, 199_999])
    for model in (AddOneBigram.fit(train, 200_000), InterpolatedBigram.fit(train, 200_000)):
        assert 1 < perplexity(model, heldout) < 10**8


def test_a_token_outside_the_vocabulary_is_noticed() -> None:
    with pytest.raises(AssertionError, match="vocabulary of 3"):
        count_pairs(np.array([0, 3]), 3)
