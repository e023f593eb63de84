"""Batches as torch tensors, for one data rank at a time.

Owns the cut of windows into tokens, labels and mask. The order of samples is the `sampler`'s; a rank is told
its place as two integers, so nothing here knows of process groups. All tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megalm.data.sampler import GlobalOrder, held_out_labels, held_out_windows, training_windows
from megalm.data.token_file import TokenFile


@dataclass(frozen=True)
class Batch:
    """B samples of T tokens: tokens_BT and labels_BT int64, loss_mask_BT bool (False: no loss here)."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    loss_mask_BT: torch.Tensor

    def cut(self, pieces: int) -> Batch:
        """Return the same tokens as B * pieces samples of T / pieces tokens; a sample's pieces follow each other."""
        parts = (self.tokens_BT, self.labels_BT, self.loss_mask_BT)
        return Batch(*(part.reshape(len(part) * pieces, -1) for part in parts))


class Loader:
    """The training batches of one data rank. The text is one stream of documents; a sample may span several.

    `order` None goes through the file from the start. Raises DataError if the file is too small for one
    window.
    """

    def __init__(
        self, token_file: TokenFile, sequence: int, order: GlobalOrder | None, data_rank: int, data_size: int
    ) -> None:
        assert 0 <= data_rank < data_size, f"data_rank={data_rank} data_size={data_size}"
        self.windows = training_windows(len(token_file), sequence)
        assert order is None or order.windows == self.windows, f"an order of {order and order.windows} windows"
        self._file = token_file
        self._sequence = sequence
        self._order = order
        self._data_rank = data_rank
        self._data_size = data_size

    def batch(self, first_sample: int, global_batch: int) -> Batch:
        """Return this rank's rows of the global batch that starts at sample `first_sample`.

        Rank r of D takes global samples first_sample + r*G/D to first_sample + (r+1)*G/D - 1, in this order.
        """
        rows, rest = divmod(global_batch, self._data_size)
        assert rest == 0, f"global_batch={global_batch} over {self._data_size} data ranks"
        first = first_sample + self._data_rank * rows
        if self._order is None:
            windows = np.arange(first, first + rows) % self.windows
        else:
            windows = self._order.indices(first, rows)
        length = self._sequence
        spans = np.stack([self._file.window(int(window) * length, length + 1) for window in windows])
        mask = torch.ones(rows, length, dtype=torch.bool)
        return Batch(_tensor(spans[:, :-1]), _tensor(spans[:, 1:]), mask)


@dataclass(frozen=True)
class HeldOut:
    """The windows of a held-out file, in its order; they predict every token but the first exactly once.

    `sequences`: only the first so many windows, None for all.
    """

    token_file: TokenFile
    sequence: int
    sequences: int | None = None

    @property
    def windows(self) -> int:
        """Number of windows. Raises DataError if there is nothing to predict."""
        return held_out_windows(len(self.token_file), self.sequence, self.sequences)

    @property
    def labels(self) -> int:
        """Number of predicted tokens, over all windows and all ranks: the tokens at positions 1 to this."""
        return held_out_labels(len(self.token_file), self.sequence, self.sequences)

    def rows(self, first: int, count: int) -> Batch:
        """Return windows `first` to `first + count - 1`; what lies beyond the last one is masked."""
        tokens = np.zeros((count, self.sequence), dtype=np.int64)
        labels = np.zeros((count, self.sequence), dtype=np.int64)
        mask = np.zeros((count, self.sequence), dtype=np.bool_)
        for row, window in enumerate(range(first, min(first + count, self.windows))):
            start = window * self.sequence
            length = min(self.sequence, self.labels - start)
            span = self.token_file.window(start, length + 1)
            tokens[row, :length], labels[row, :length], mask[row, :length] = span[:-1], span[1:], True
        return Batch(_tensor(tokens), _tensor(labels), torch.from_numpy(mask))


def held_out_batches(held_out: HeldOut, micro_batch: int, data_rank: int, data_size: int) -> Iterator[Batch]:
    """Yield this data rank's microbatches of `micro_batch` rows; all ranks together see each window once.

    Every rank gets the same number of microbatches, so that collectives agree; rows that are left over are
    masked.
    """
    assert 0 <= data_rank < data_size, f"data_rank={data_rank} data_size={data_size}"
    for first in range(0, held_out.windows, micro_batch * data_size):
        yield held_out.rows(first + data_rank * micro_batch, micro_batch)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
