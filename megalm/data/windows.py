"""How a token file is cut into windows, each of which is a row of a batch.

Owns the arithmetic: where a window begins and how many tokens it has. The window of tokens[a : a + n] predicts
tokens[a + 1 : a + n + 1]. `stream` cuts the file into pieces of T tokens without regard to documents, `documents` gives
each document a window of its own, or as many as it fills; what a row then lacks is padding. Both go through the file
from its start and predict no token twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalm.data.token_file import REMEDY, TokenFile
from megalm.errors import DataError
from megalm.registry import Registry

BLOCK = 1024
"""Windows are counted once a block of so many documents, so that an index of a billion documents is 8 MB."""
CHUNK = 1 << 20
"""So many documents are counted at once."""


class Windows(Protocol):
    """The windows of a token file, at most `sequence` tokens each."""

    sequence: int

    def __len__(self) -> int:
        """Return their number."""

    def span(self, window: int) -> tuple[int, int]:
        """Return a window's first token and the number of its tokens."""


WINDOWS: Registry[Callable[[TokenFile, int, bool], Windows]] = Registry("rows")


@WINDOWS.register("stream")
class StreamWindows:
    """Windows of T tokens each. What is left at the end is one more, shorter, where each token is to be predicted."""

    def __init__(self, file: TokenFile, sequence: int, every_token: bool = False) -> None:
        self.sequence = sequence
        self._predicted = len(file) - 1
        self._count = -(-self._predicted // sequence) if every_token else self._predicted // sequence

    def __len__(self) -> int:
        """Return their number."""
        return self._count

    def span(self, window: int) -> tuple[int, int]:
        """Return a window's first token and the number of its tokens."""
        start = window * self.sequence
        return start, min(self.sequence, self._predicted - start)


@WINDOWS.register("documents")
class DocumentWindows:
    """Windows of one document each: ceil(n / T) for one of n tokens, the last of them perhaps short.

    A document's last token predicts the end-of-text token with which the next one begins; that of the file's last
    document predicts nothing. A window is found by a binary search among blocks of documents and the count of one
    block. Raises DataError where the file's index of documents is damaged.
    """

    def __init__(self, file: TokenFile, sequence: int, every_token: bool = False) -> None:
        self.sequence = sequence
        self._file = file
        blocks = [np.zeros(1, dtype=np.int64)]
        for first in range(0, file.documents, CHUNK):
            windows = self._windows(self._lengths(first, min(first + CHUNK, file.documents)))
            blocks.append(np.add.reduceat(windows, np.arange(0, len(windows), BLOCK)))
        self._before = np.concatenate(blocks).cumsum()
        """[blocks + 1]: the windows of all blocks before each."""

    def __len__(self) -> int:
        """Return their number."""
        return int(self._before[-1])

    def span(self, window: int) -> tuple[int, int]:
        """Return a window's first token and the number of its tokens."""
        block = int(np.searchsorted(self._before, window, side="right")) - 1
        first = block * BLOCK
        lengths = self._lengths(first, min(first + BLOCK, self._file.documents))
        ends = self._before[block] + self._windows(lengths).cumsum()
        document = int(np.searchsorted(ends, window, side="right"))
        after = int(ends[document]) - window  # this document's windows from this one on
        pieces = -(-int(lengths[document]) // self.sequence)
        done = (pieces - after) * self.sequence
        return int(self._file.offsets[first + document]) + done, min(self.sequence, int(lengths[document]) - done)

    def _windows(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-lengths // self.sequence)

    def _lengths(self, first: int, end: int) -> NDArray[np.int64]:
        """Return how many tokens documents `first` to `end - 1` predict: int64 [documents]."""
        starts = self._file.offsets[first : end + 1].astype(np.int64)
        last_of_file = end == self._file.documents
        if last_of_file:
            starts = np.append(starts, max(len(self._file) - 1, int(starts[-1])))
        lengths = np.diff(starts)
        inner = lengths[:-1] if last_of_file else lengths  # an empty last document predicts nothing
        if inner.min(initial=1) < 1 or lengths[-1] < 0 or starts[-1] >= len(self._file):
            raise DataError(f"{self._file.path} is damaged: its documents {first} to {end} do not rise; {REMEDY}")
        return lengths


def training_windows(file: TokenFile, sequence: int, rows: str) -> Windows:
    """Return the windows that training draws from. Raises DataError if there is none."""
    windows = WINDOWS.get(rows)(file, sequence, False)
    if not len(windows):
        raise DataError(
            f"{len(file)} tokens are too few for one window of model.sequence={sequence}; "
            f"use more text, or a sequence of at most {max(1, len(file) - 1)}"
        )
    return windows


def all_windows(file: TokenFile, sequence: int, rows: str) -> Windows:
    """Return windows that predict each token of the file but the first, once. Raises DataError if there is none."""
    windows = WINDOWS.get(rows)(file, sequence, True)
    if not len(windows):
        raise DataError(
            f"{len(file)} held-out tokens leave nothing to predict; use more text or a larger held-out share"
        )
    return windows


def predicted_tokens(windows: Windows, sequences: int | None = None) -> int:
    """Return how many tokens the first `sequences` windows (None: all) predict: those at positions 1 to this."""
    last = len(windows) if sequences is None else min(len(windows), sequences)
    return sum(windows.span(last - 1))
