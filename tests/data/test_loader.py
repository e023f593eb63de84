"""Batches: the right rows on each rank, labels one token ahead, each held-out token predicted once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.loader import Batch, HeldOut, Loader, held_out_batches
from megalm.data.sampler import GlobalOrder
from megalm.data.token_file import TokenFile, TokenFileWriter
from megalm.data.windows import all_windows, predicted_tokens, training_windows


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def counting_file(directory: Path, tokens: int) -> TokenFile:
    """Return a file whose token at position n is n + 1, so that every value says where it comes from."""
    path = directory / f"{tokens}.tokens"
    if not path.exists():
        with TokenFileWriter(path, tokens + 1, "00" * 32) as writer:
            writer.append(np.arange(1, tokens + 1))
    return TokenFile(path)


def loader_of(file: TokenFile, order: GlobalOrder | None, data_rank: int, data_size: int) -> Loader:
    return Loader(file, training_windows(file, 4, "stream"), order, data_rank, data_size)


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens_BT", "labels_BT", "loss_mask_BT"))
    )


def test_labels_are_the_next_tokens_and_windows_do_not_overlap(directory: Path) -> None:
    batch = loader_of(counting_file(directory, 13), None, 0, 1).batch(0, 3, 3)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch.labels_BT.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert batch.loss_mask_BT.dtype == torch.bool and batch.loss_mask_BT.all()
    assert batch.tokens_BT.is_contiguous() and batch.labels_BT.is_contiguous()


def test_without_an_order_the_file_starts_again(directory: Path) -> None:
    batch = loader_of(counting_file(directory, 13), None, 0, 1).batch(2, 2, 2)
    assert batch.tokens_BT[:, 0].tolist() == [9, 1]


def test_an_epoch_has_every_token_as_a_label_once(directory: Path) -> None:
    loader = loader_of(counting_file(directory, 401), GlobalOrder(100, 5), 0, 1)
    labels = joined([loader.batch(first, 10, 10) for first in range(0, 100, 10)]).labels_BT
    assert sorted(labels.flatten().tolist()) == list(range(2, 402))


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 12), count=st.integers(1, 24), micro_batch=st.integers(1, 3), first=st.integers(0, 500),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_ranks_together_make_the_global_batch_in_order(
    directory: Path, size: int, count: int, micro_batch: int, first: int, seed: int
) -> None:
    file = counting_file(directory, 401)
    rows = -(-count // (size * micro_batch)) * micro_batch
    whole = loader_of(file, GlobalOrder(100, seed), 0, 1).batch(first, count, count)
    parts = [loader_of(file, GlobalOrder(100, seed), rank, size).batch(first, count, rows) for rank in range(size)]
    mask_B = joined(parts).loss_mask_BT.all(1)
    assert mask_B.sum() == count and rows % micro_batch == 0 and rows * size - count < micro_batch * size
    assert torch.equal(joined(parts).tokens_BT[mask_B], whole.tokens_BT)
    assert torch.equal(joined(parts).labels_BT[mask_B], whole.labels_BT)
    assert not joined(parts).loss_mask_BT[~mask_B].any()


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.integers(2, 60),
    sequence=st.integers(1, 9),
    micro_batch=st.integers(1, 4),
    size=st.integers(1, 5),
    sequences=st.none() | st.integers(1, 8),
    rows=st.sampled_from(["stream", "documents"]),
)
def test_each_held_out_token_is_predicted_once_by_the_token_before_it(
    directory: Path, tokens: int, sequence: int, micro_batch: int, size: int, sequences: int | None, rows: str
) -> None:
    file = counting_file(directory, tokens)
    windows = all_windows(file, sequence, rows)
    held_out = HeldOut(file, windows, sequences)
    ranks = [list(held_out_batches(held_out, micro_batch, rank, size)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1, "collectives need as many microbatches on every rank"
    assert all(batch.tokens_BT.shape == (micro_batch, sequence) for batches in ranks for batch in batches)
    everything = joined([batches[n] for n in range(len(ranks[0])) for batches in ranks])
    predicted = everything.labels_BT[everything.loss_mask_BT]
    assert predicted.tolist() == list(range(2, predicted_tokens(windows, sequences) + 2)), "in the order of the file"
    assert torch.equal(everything.tokens_BT[everything.loss_mask_BT], predicted - 1)
    if sequences is None:
        assert predicted_tokens(windows) == tokens - 1
    assert len(everything.tokens_BT) - micro_batch * size < len(held_out) <= len(everything.tokens_BT)


def test_a_document_is_padded_and_a_long_one_has_several_rows(directory: Path) -> None:
    path = directory / "documents.tokens"
    with TokenFileWriter(path, 100, "00" * 32) as writer:
        for document in ([1, 11, 12], [1], [1, 21, 22, 23, 24, 25], [1, 31]):
            writer.append(np.array(document))
    file = TokenFile(path)
    windows = training_windows(file, 4, "documents")
    batch = Loader(file, windows, None, 0, 1).batch(0, 6, 6)
    tokens, labels = batch.tokens_BT.tolist()[:5], batch.labels_BT.tolist()[:5]
    assert tokens == [[1, 11, 12, 0], [1, 0, 0, 0], [1, 21, 22, 23], [24, 25, 0, 0], [1, 0, 0, 0]]
    assert labels == [[11, 12, 1, 0], [1, 0, 0, 0], [21, 22, 23, 24], [25, 1, 0, 0], [31, 0, 0, 0]]
    assert batch.loss_mask_BT.sum(1).tolist() == [3, 1, 4, 2, 1, 3], "the sixth row is the first again"
    assert torch.equal(batch.loss_mask_BT, batch.labels_BT != 0)
