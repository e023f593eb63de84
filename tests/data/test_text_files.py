"""A user's text files: every document arrives exactly, and what is not text is named with file and line."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.data.text_files import ReadLimits, TextFiles
from megalm.errors import DataError

SMALL = ReadLimits(line_bytes=1000, document_bytes=3000, unpacked_ratio=3, unpacked_free_bytes=2000)


def texts(path: Path, **options: object) -> list[str]:
    corpus = TextFiles.find([path], **options)  # type: ignore[arg-type]
    return [document.text for document in corpus.documents()]


def message(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        texts(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_file_is_one_document_exactly(tmp_path: Path) -> None:
    text = "first\r\n\n\tzweite Zeile äöü\u2028 \U0001f600 no end of line"
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    assert texts(file) == [text]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhello")
    assert texts(file) == ["hello"]


@pytest.mark.parametrize("separator", ["", "---"])
def test_a_separator_line_parts_documents(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(f"{separator}\none\nmore\n{separator}\n{separator}\ntwo\n{separator}\n")
    documents = list(TextFiles.find([file], separator).documents())
    assert [document.text for document in documents] == ["one\nmore\n", "two\n"]
    assert [document.name for document in documents] == [f"{file}:2", f"{file}:6"]


def test_jsonl_gives_the_chosen_field_and_skips_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "a\\nb \\ud83d\\ude00", "text": "no"}\n\n{"body": "ü"}')
    assert texts(file, text_field="body") == ["a\nb \U0001f600", "ü"]


def test_packed_files_read_as_unpacked_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "json"}'))
    assert texts(tmp_path) == ["packed", "json"]


def test_directories_are_read_by_name_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    for name in ("b.txt", "z/a.txt", "a.txt", ".hidden.txt", "image.png"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt").symlink_to(tmp_path / "b.txt")
    corpus = TextFiles.find([tmp_path / "z", tmp_path, tmp_path / "a.txt"])
    assert [document.text for document in corpus.documents()] == ["z/a.txt", "a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"good\nbad \xff byte\n", "a.txt:2: byte 0xff at column 5 is not UTF-8"),
        ("Schr\u00f6der".encode("latin-1"), "a.txt:1: byte 0xf6 at column 5 is not UTF-8"),
        (b"short\n" + b"x" * 1001, "a.txt:2: the line is longer than 1000 bytes"),
        (b"x\n" * 2000, "a.txt:1501: the document is longer than 3000 characters"),
    ],
)
def test_bad_text_is_named_by_file_and_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert expected in message(tmp_path / "a.txt", limits=SMALL)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "a.jsonl:2: not a JSON object"),
        ("[1]", "a.jsonl:2: .*a JSON list, not an object"),
        ('{"body": "x"}', "a.jsonl:2: no text under \"text\" .the fields are 'body'"),
        ('{"text": 3}', 'a.jsonl:2: no text under "text"'),
        ('{"text": "\\ud800"}', "a.jsonl:2: character 0 is half of a surrogate pair"),
        ("[" * 100_000, "a.jsonl:2: .*nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "a.jsonl:2: not a JSON object"),
    ],
)
def test_bad_json_is_named_by_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    assert re.search(expected, message(file))


def test_a_packed_file_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"0123456789\n" * 100_000))
    assert "unpacks to more than" in message(file, limits=replace(SMALL, document_bytes=1 << 30))
    assert len(texts(file)[0]) == 1_100_000


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"no gzip" + data[7:]])
def test_a_damaged_packed_file_is_an_error(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(damage(gzip.compress(bytes(range(32, 120)) * 50)))  # type: ignore[operator]
    assert f"cannot read {file}" in message(file)


def test_paths_that_hold_no_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    assert "does not exist" in message(tmp_path / "missing.txt")
    assert "unknown kind of text file '.pdf'" in message(tmp_path / "a.pdf")
    assert "holds no text files" in message(tmp_path)
