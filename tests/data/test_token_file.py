"""Token files: what is written is read back, at any position, and no damage goes unseen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megalm.data import token_file as module
from megalm.data.token_file import HEADER_BYTES, Header, TokenFile, TokenFileWriter
from megalm.errors import DataError

TOKENIZER = "ab" * 32


def written(path: Path, documents: list[list[int]], vocabulary: int = 1000) -> TokenFile:
    with TokenFileWriter(path, vocabulary, TOKENIZER) as writer:
        for document in documents:
            writer.append(np.array(document))
    return TokenFile(path)


@pytest.mark.parametrize(("vocabulary", "token_bytes"), [(1000, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_documents_are_read_back(tmp_path: Path, vocabulary: int, token_bytes: int) -> None:
    documents = [[0, 5, vocabulary - 1], [0], [0, 7, 7, 7, 7]]
    file = written(tmp_path / "x.tokens", documents, vocabulary)
    assert file.tokens.dtype == np.dtype(f"<u{token_bytes}")
    assert [file.document(number).tolist() for number in range(3)] == documents
    assert file.tokens.tolist() == [token for document in documents for token in document]
    assert (len(file), file.documents, file.vocabulary, file.tokenizer_fingerprint) == (9, 3, vocabulary, TOKENIZER)
    file.verify()


def test_a_window_is_int64_and_may_span_documents(tmp_path: Path) -> None:
    window = written(tmp_path / "x.tokens", [[0, 1, 2], [0, 3]]).window(1, 4)
    assert window.dtype == np.int64 and window.tolist() == [1, 2, 0, 3]


def test_the_fingerprint_follows_tokens_and_boundaries(tmp_path: Path) -> None:
    variants = [[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 4]], [[1, 2], [3]]]
    prints = [written(tmp_path / f"{n}.tokens", variant).fingerprint for n, variant in enumerate(variants)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("tokens", [[1000], [-1], [0, 70_000]])
def test_a_token_outside_the_vocabulary_cannot_be_written(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(AssertionError, match="vocabulary of 1000"):
        written(tmp_path / "x.tokens", [tokens])
    assert list(tmp_path.iterdir()) == []


def test_the_name_appears_only_when_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    with pytest.raises(KeyboardInterrupt), TokenFileWriter(path, 10, TOKENIZER) as writer:
        writer.append(np.array([1]))
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    written(path, [[1]])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tokens"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "x.tokens", []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append((kind, os.fstat(descriptor).st_size))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> Path:
        events.append(("rename", source.stat().st_size))
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    size = written(path, [[1, 2, 3]]).header.file_bytes
    assert events[:2] == [("file", size), ("rename", size)]
    assert [kind for kind, _ in events] == ["file", "rename", "directory"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:40], "is truncated"),
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data[:HEADER_BYTES], "is truncated"),
        (lambda data: data + b"\0", "is too long"),
        (lambda data: b"PK\3\4" + data[4:], "is not a token file"),
        (lambda data: data[:8] + b"\2" + data[9:], "has version 2"),
        (lambda data: data[:16] + b"\7" + data[17:], "header does not match"),
        (lambda data: data[:32] + b"\7" + data[33:], "header does not match"),
        (lambda data: data[:90] + b"\7" + data[91:], "header does not match"),
    ],
)
def test_a_foreign_or_damaged_file_is_an_error_of_one_line(tmp_path: Path, damage: object, reason: str) -> None:
    path = tmp_path / "x.tokens"
    written(path, [[1, 2, 3], [4]])
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=reason) as caught:
        TokenFile(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) and "megalm data prepare" in str(caught.value)


def test_missing_files_and_files_without_documents_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        TokenFile(tmp_path / "none.tokens")
    with pytest.raises(DataError, match="Is a directory"):
        TokenFile(tmp_path)
    with pytest.raises(DataError, match="no documents"):
        written(tmp_path / "x.tokens", [])


def test_verify_sees_every_flipped_bit_of_the_payload(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    written(path, [[1, 2, 3], [4]])
    data = path.read_bytes()
    for position in range(HEADER_BYTES, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        with pytest.raises(DataError, match="do not match their checksum"):
            TokenFile(path).verify()


def test_a_damaged_token_is_noticed_before_it_indexes_an_embedding(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    written(path, [[1, 2, 3]], vocabulary=10)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 3] = 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="token 258 near position 0 is outside its vocabulary of 10"):
        TokenFile(path).window(0, 3)


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_tokens_and_documents_beyond_two_to_the_31_are_read(tmp_path: Path, token_bytes: int) -> None:
    path, position = tmp_path / "large.tokens", (1 << 31) + (1 << 20) + 3
    header = Header(token_bytes, position + 5, 2, 50_000, bytes(32), bytes(32))
    with open(path, "wb") as stream:  # sparse: the gigabytes of zeros take no room on the disk
        stream.write(header.pack())
        stream.truncate(header.file_bytes)
        stream.seek(HEADER_BYTES + position * token_bytes)
        stream.write(np.array([11, 12, 13, 14, 15], dtype=module.TOKEN_TYPES[token_bytes]).tobytes())
        stream.seek(header.offsets_at + 8)
        stream.write(np.array([position + 1], dtype="<i8").tobytes())
    file = TokenFile(path)
    assert len(file) == position + 5 > 1 << 31
    assert file.window(position - 1, 4).tolist() == [0, 11, 12, 13]
    assert file.document(1).tolist() == [12, 13, 14, 15]
    with pytest.raises(DataError, match="truncated"):
        os.truncate(path, header.file_bytes - 8)
        TokenFile(path)
