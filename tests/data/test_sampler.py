"""The order of samples: a permutation each epoch, the same whoever asks for whichever part of it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.sampler import GlobalOrder

seeds = st.integers(0, 2**63)


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 7, 8, 13, 63, 64, 65, 97, 1000, 1021, 4096, 4097, 65_537, 200_003])
@pytest.mark.parametrize("epoch", [0, 1])
def test_each_epoch_goes_through_every_window_once(windows: int, epoch: int) -> None:
    indices = GlobalOrder(windows, seed=3).indices(epoch * windows, windows)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(windows))


@settings(deadline=None, max_examples=60)
@given(windows=st.integers(1, 3000), seed=seeds)
def test_an_epoch_of_any_size_is_a_permutation(windows: int, seed: int) -> None:
    assert np.array_equal(np.sort(GlobalOrder(windows, seed).indices(0, windows)), np.arange(windows))


@settings(deadline=None, max_examples=60)
@given(windows=st.integers(1, 400), seed=seeds, first=st.integers(0, 2000), count=st.integers(0, 900))
def test_any_slice_equals_the_samples_one_by_one(windows: int, seed: int, first: int, count: int) -> None:
    order = GlobalOrder(windows, seed)
    whole = order.indices(0, first + count)
    assert np.array_equal(order.indices(first, count), whole[first:])
    if count:
        assert order.index(first) == whole[first]


@settings(deadline=None, max_examples=30)
@given(windows=st.integers(1, 500), seed=seeds, step=st.integers(0, 50), global_batch=st.integers(1, 32))
def test_data_ranks_together_see_the_global_order_whatever_their_number(
    windows: int, seed: int, step: int, global_batch: int
) -> None:
    order = GlobalOrder(windows, seed)
    expected = order.indices(step * global_batch, global_batch)
    for size in (d for d in range(1, global_batch + 1) if global_batch % d == 0):
        rows = global_batch // size
        parts = [order.indices(step * global_batch + r * rows, rows) for r in range(size)]
        assert np.array_equal(np.concatenate(parts), expected)


def test_epochs_and_seeds_give_different_orders() -> None:
    order = GlobalOrder(1000, seed=1)
    first, second = order.indices(0, 1000), order.indices(1000, 1000)
    other = GlobalOrder(1000, seed=2).indices(0, 1000)
    for one, two in [(first, second), (first, other)]:
        assert (one == two).sum() < 10  # about one is expected to stand still
    assert (first == np.arange(1000)).sum() < 10


def test_the_order_never_changes() -> None:
    """A resumed run must meet the samples it has not seen: these numbers may change only with a new format."""
    first, second = [9, 8, 3, 4, 6, 0, 7, 2, 1, 5], [4, 3, 6, 5, 9, 0, 7, 8, 1, 2]
    assert GlobalOrder(10, seed=1234).indices(0, 20).tolist() == first + second


def test_every_permutation_of_three_occurs_about_equally_often() -> None:
    drawn = GlobalOrder(3, seed=1).indices(0, 9000).reshape(3000, 3)
    _, counts = np.unique(drawn @ [9, 3, 1], return_counts=True)
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-squared with 5 degrees of freedom: 1 in 1,000


def test_where_a_window_goes_is_uniform_and_neighbours_are_independent() -> None:
    windows, bins, rounds = 1000, 10, 400
    order = GlobalOrder(windows, seed=7)
    epochs = np.stack([order.indices(epoch * windows, windows) for epoch in range(rounds)])
    for column in (0, 1, 499, 999):
        counts = np.bincount(epochs[:, column] * bins // windows, minlength=bins)
        assert ((counts - rounds / bins) ** 2 / (rounds / bins)).sum() < 33.7  # 9 degrees of freedom: 1 in 10,000
    assert abs(np.corrcoef(epochs[:, :-1].ravel(), epochs[:, 1:].ravel())[0, 1] + 1 / windows) < 0.01


def test_memory_does_not_grow_with_the_number_of_windows() -> None:
    tracemalloc.start()
    indices = GlobalOrder(10**15 + 37, seed=1).indices(10**15, 64)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000
    assert len(set(indices.tolist())) > 60 and indices.max() > 10**14
