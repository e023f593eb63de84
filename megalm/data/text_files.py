"""A user's own text: .txt and .jsonl files, each also as .gz, and directories of them.

Owns reading them as a stream of documents, with every bound that keeps memory small on any input. A
`TextFiles` is a `Corpus` (see `corpus`).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from megalm.data.corpus import Document
from megalm.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class ReadLimits:
    """Bounds on what a file may ask of memory and time.

    `unpacked_ratio`: a .gz may unpack to at most this many times its own size (text packs 3 to 20 times; the
    format allows 1,000), or to `unpacked_free_bytes` where that is more.
    """

    line_bytes: int = 64 << 20
    document_bytes: int = 64 << 20
    unpacked_ratio: int = 200
    unpacked_free_bytes: int = 64 << 20


@dataclass(frozen=True)
class TextFiles:
    """The documents of some files, in the order of `files`, read as a stream.

    A .jsonl file has one JSON object a line, its text under `text_field`. A .txt file is one document, or,
    with `separator`, one document between lines that equal the separator (an empty separator: blank lines).
    """

    files: tuple[Path, ...]
    separator: str | None = None
    text_field: str = "text"
    limits: ReadLimits = field(default_factory=ReadLimits)

    @classmethod
    def find(
        cls,
        paths: Sequence[str | Path],
        separator: str | None = None,
        text_field: str = "text",
        limits: ReadLimits | None = None,
    ) -> TextFiles:
        """Return the corpus of `paths`: files, and directories with text files in them, each file once.

        Raises DataError for a path that is missing or holds no text.
        """
        found: dict[str, Path] = {}
        for path in map(Path, paths):
            for file in sorted(text_files_under(path)) if path.is_dir() else [known_text_file(path)]:
                found.setdefault(os.path.realpath(file), file)
        if not found:
            raise DataError("no text files were given; name .txt or .jsonl files, or directories of them")
        return cls(tuple(found.values()), separator, text_field, limits or ReadLimits())

    @property
    def description(self) -> str:
        """One line for people: the files' names and number."""
        names = ", ".join(str(file) for file in self.files[:3])
        return names if len(self.files) <= 3 else f"{names} and {len(self.files) - 3} more files"

    def documents(self) -> Iterator[Document]:
        """Go through all documents. Raises DataError, naming file and line, for what is not text."""
        for file in self.files:
            read = self._objects if file.name.removesuffix(".gz").endswith(".jsonl") else self._texts
            yield from read(file)

    def _texts(self, file: Path) -> Iterator[Document]:
        lines: list[str] = []
        first, total = 1, 0
        for number, line in read_lines(file, self.limits):
            if self.separator is not None and line.strip() == self.separator.strip():
                yield from _document(file, first, lines)
                lines, first, total = [], number + 1, 0
                continue
            lines.append(line)
            total += len(line)
            if total > self.limits.document_bytes:
                raise DataError(
                    f"{file}:{number}: the document is longer than {self.limits.document_bytes} characters; "
                    "name a separator line that splits the file into documents"
                )
        yield from _document(file, first, lines)

    def _objects(self, file: Path) -> Iterator[Document]:
        for number, line in read_lines(file, self.limits):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise DataError(f"{file}:{number}: not a JSON object: {reason}; write one object a line") from error
            if not isinstance(value, dict) or not isinstance(value.get(self.text_field), str):
                raise DataError(
                    f'{file}:{number}: no text under "{self.text_field}" ({_shape(value)}); '
                    "name the field that holds the text"
                )
            text = value[self.text_field]
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{file}:{number}: character {error.start} is half of a surrogate pair; remove it"
                ) from error
            yield from _document(file, number, [text])


def _document(file: Path, line: int, parts: list[str]) -> Iterator[Document]:
    text = "".join(parts)
    if text.strip():
        yield Document(f"{file}:{line}", text)


def _shape(value: object) -> str:
    if not isinstance(value, dict):
        return f"the line is a JSON {type(value).__name__}, not an object"
    fields = ", ".join(repr(name)[:40] for name in list(value)[:8])
    return f"the fields are {fields}" if value else "the object is empty"


def known_text_file(path: Path) -> Path:
    """Return `path`. Raises DataError unless it is a regular file with a suffix that says how to read it."""
    if not path.exists():
        raise DataError(f"text file {path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file; give {', '.join(SUFFIXES)} files or directories of them")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of text file {path.suffix!r}; use {', '.join(SUFFIXES)}")
    return path


def text_files_under(directory: Path) -> list[Path]:
    """Return the text files below `directory`; hidden files and links to directories are not followed."""
    found = []

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from error

    for parent, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = [name for name in directories if not name.startswith(".")]
        candidates = (Path(parent) / name for name in names if not name.startswith(".") and name.endswith(SUFFIXES))
        found += [file for file in candidates if file.is_file()]
    if not found:
        raise DataError(f"directory {directory} holds no text files; put {', '.join(SUFFIXES)} files into it")
    return found


def read_lines(file: Path, limits: ReadLimits) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its line end) of a text file in UTF-8, packed or not.

    Raises DataError, naming the line: not UTF-8, a line over the bound, a damaged or ever-growing .gz.
    """
    packed = file.name.endswith(".gz")
    opened: Callable[..., object] = gzip.open if packed else open
    number, total = 0, 0
    try:
        unpacked_bytes = max(limits.unpacked_free_bytes, limits.unpacked_ratio * file.stat().st_size)
        with cast(BinaryIO, opened(file, "rb")) as stream:
            while raw := stream.readline(limits.line_bytes + 1):
                number += 1
                total += len(raw)
                if len(raw) > limits.line_bytes:
                    raise DataError(f"{file}:{number}: the line is longer than {limits.line_bytes} bytes; break it up")
                if packed and total > unpacked_bytes:
                    raise DataError(
                        f"{file}:{number}: unpacks to more than {unpacked_bytes} bytes, "
                        f"{limits.unpacked_ratio} times its size; unpack it yourself if you trust it"
                    )
                yield number, _decoded(raw, file, number)
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"cannot read {file} after line {number}: {reason}; check or fetch the file again") from error


def _decoded(raw: bytes, file: Path, number: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}:{number}: byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8; "
            "convert the file to UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if number == 1 else text
