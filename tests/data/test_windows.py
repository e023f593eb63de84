"""Windows: each token predicted once, documents apart, an index that does not grow with the corpus."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data import windows as windows_module
from megalm.data.windows import DocumentWindows, StreamWindows, all_windows, predicted_tokens, training_windows
from megalm.errors import DataError


class File(SimpleNamespace):
    """The lengths of a token file's documents, without their tokens."""

    def __init__(self, lengths: Any) -> None:
        starts = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
        super().__init__(offsets=starts[:-1], documents=len(lengths), path=Path("a.tokens"), tokens=int(starts[-1]))

    def __len__(self) -> int:
        return self.tokens


def spans(windows: Any) -> list[tuple[int, int]]:
    return [windows.span(window) for window in range(len(windows))]


def test_a_stream_is_cut_without_regard_to_documents() -> None:
    assert [len(training_windows(File([tokens]), 4, "stream")) for tokens in (5, 8, 9)] == [1, 1, 2]
    assert [len(all_windows(File([tokens]), 4, "stream")) for tokens in (2, 5, 6, 9, 10)] == [1, 1, 2, 2, 3]
    assert spans(all_windows(File([3, 7]), 4, "stream")) == [(0, 4), (4, 4), (8, 1)]
    assert predicted_tokens(all_windows(File([100]), 4, "stream"), 3) == 12
    assert predicted_tokens(all_windows(File([10]), 4, "stream"), 99) == 9


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    sequence=st.integers(1, 6),
    block=st.integers(1, 5),
    blocks_a_chunk=st.integers(1, 3),
)
def test_document_windows_are_those_of_each_document(
    lengths: list[int], sequence: int, block: int, blocks_a_chunk: int
) -> None:
    expected, start = [], 0
    for number, length in enumerate(lengths):
        predicting = length - (number == len(lengths) - 1)
        expected += [(start + n, min(sequence, predicting - n)) for n in range(0, predicting, sequence)]
        start += length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "BLOCK", block)
        patch.setattr(windows_module, "CHUNK", block * blocks_a_chunk)
        windows: Any = DocumentWindows(File(lengths), sequence)  # type: ignore[arg-type]
        assert spans(windows) == expected
        assert len(windows) == 0 or predicted_tokens(windows) == sum(lengths) - 1


def test_the_index_of_many_documents_is_small() -> None:
    file = File(np.tile([1, 700, 3000], 700_000))
    tracemalloc.start()
    windows: Any = DocumentWindows(file, 1024)  # type: ignore[arg-type]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) == 700_000 * 5
    assert windows.span(5 * 600_000 + 3) == (600_000 * 3701 + 701 + 1024, 1024)
    assert held < 100_000
    assert peak < 60e6, "a chunk of offsets at a time"


@pytest.mark.parametrize("rows", ["stream", "documents"])
def test_a_file_without_a_window_is_an_error_with_the_remedy(rows: str) -> None:
    with pytest.raises(DataError, match=r"1 tokens are too few .* model.sequence=4; .* at most 1"):
        training_windows(File([1]), 4, rows)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="nothing to predict"):
        all_windows(File([1]), 4, rows)  # type: ignore[arg-type]


def test_training_on_a_stream_leaves_out_a_window_that_is_not_whole() -> None:
    with pytest.raises(DataError, match=r"4 tokens are too few .* model.sequence=4; .* at most 3"):
        training_windows(File([4]), 4, "stream")  # type: ignore[arg-type]
    assert len(StreamWindows(File([4]), 4, every_token=True)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("offsets", [[0, 5, 5, 9], [0, 6, 5, 9], [0, 5, 9, 12], [0, 5, 7, 99]])
def test_an_index_that_does_not_rise_is_damage(offsets: list[int]) -> None:
    file = File([5, 2, 2, 3])
    file.offsets = np.array(offsets)
    with pytest.raises(DataError, match=r"a\.tokens is damaged: its documents 0 to 4 do not rise; make the data again"):
        DocumentWindows(file, 4)  # type: ignore[arg-type]
