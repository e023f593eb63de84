"""Batches as torch tensors, for one data rank at a time.

Owns the cut of windows into tokens, labels and mask. Which windows there are is told by `windows`, their order by the
`sampler`; a rank is told its place as two integers, so nothing here knows of process groups. All tensors are on the
CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megalm.data.sampler import GlobalOrder
from megalm.data.token_file import TokenFile
from megalm.data.windows import Windows


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
    """The training batches of one data rank: windows of a token file, in the order of training.

    `order` None goes through the file from the start.
    """

    def __init__(
        self, token_file: TokenFile, windows: Windows, order: GlobalOrder | None, data_rank: int, data_size: int
    ) -> None:
        assert 0 <= data_rank < data_size, f"data_rank={data_rank} data_size={data_size}"
        assert order is None or order.windows == len(windows), f"an order of {order and order.windows} windows"
        self._file = token_file
        self._windows = windows
        self._order = order
        self._data_rank = data_rank
        self._data_size = data_size

    def batch(self, first_sample: int, global_batch: int, rows: int) -> Batch:
        """Return this rank's `rows` rows of the global batch that starts at sample `first_sample`.

        Rank r takes samples first_sample + r*rows to first_sample + (r+1)*rows - 1, in this order; rows behind the end
        of the global batch are masked.
        """
        assert global_batch <= rows * self._data_size, f"{self._data_size} data ranks of {rows} rows: {global_batch=}"
        first = first_sample + self._data_rank * rows
        count = max(0, min(rows, first_sample + global_batch - first))
        if self._order is None:
            numbers = np.arange(first, first + count) % len(self._windows)
        else:
            numbers = self._order.indices(first, count)
        return cut(self._file, self._windows, numbers.tolist(), rows)


@dataclass(frozen=True)
class HeldOut:
    """The windows of a held-out file, in its order. `sequences`: only the first so many, None for all."""

    token_file: TokenFile
    windows: Windows
    sequences: int | None = None

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows) if self.sequences is None else min(len(self.windows), self.sequences)

    def rows(self, first: int, count: int) -> Batch:
        """Return windows `first` to `first + count - 1`; rows beyond the last one are masked."""
        return cut(self.token_file, self.windows, range(first, min(first + count, len(self))), count)


def cut(token_file: TokenFile, windows: Windows, numbers: Sequence[int], rows: int) -> Batch:
    """Return windows as a batch of `rows` rows; what lies behind a window, and behind the last one, is masked.

    Padding stands at a row's end, where causal attention shows it to no token whose loss counts.
    """
    tokens, labels = np.zeros((2, rows, windows.sequence), dtype=np.int64)
    mask = np.zeros((rows, windows.sequence), dtype=np.bool_)
    for row, window in enumerate(numbers):
        start, length = windows.span(window)
        span = token_file.window(start, length + 1)
        tokens[row, :length], labels[row, :length], mask[row, :length] = span[:-1], span[1:], True
    return Batch(*map(torch.from_numpy, (tokens, labels, mask)))


def held_out_batches(held_out: HeldOut, micro_batch: int, data_rank: int, data_size: int) -> Iterator[Batch]:
    """Yield this data rank's microbatches of `micro_batch` rows; all ranks together see each window once.

    Every rank gets the same number of microbatches, so that collectives agree; rows that are left over are
    masked.
    """
    assert 0 <= data_rank < data_size, f"data_rank={data_rank} data_size={data_size}"
    for first in range(0, len(held_out), micro_batch * data_size):
        yield held_out.rows(first + data_rank * micro_batch, micro_batch)
