"""A file of token ids: written once as a stream, then read through a memory map.

Owns the format and its integrity; which documents go into which file is left to `datasets`. Little-endian
throughout:

    bytes 0 to 127      header: magic "MEGALMTK", version u32, bytes of a token u32 (2 or 4), tokens u64,
    documents u64,
                        vocabulary u64, SHA-256 of the payload, SHA-256 of the tokenizer, CRC-32 of all before
                        it, zeros
    payload             the token ids; zeros up to a multiple of 8 bytes; the int64 index of each document's
    first token

A document begins with its end-of-text token: that is what the model is given to begin a document, and every
byte of text then has a token that comes after another, also in the first document.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megalm.errors import DataError
from megalm.files import require_regular, sync_directory

MAGIC = b"MEGALMTK"
VERSION = 1
HEADER_BYTES = 128
FIELDS = struct.Struct("<8sIIQQQ32s32s")
TOKEN_TYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
OFFSET_TYPE = np.dtype("<i8")
COPY_BYTES = 8 << 20
REMEDY = "make the data again with megalm data prepare"


@dataclass(frozen=True)
class Header:
    """The facts at the head of a token file. The digests are 32 bytes each."""

    token_bytes: int
    tokens: int
    documents: int
    vocabulary: int
    payload_sha256: bytes
    tokenizer_sha256: bytes

    @property
    def offsets_at(self) -> int:
        """Byte position of the document index."""
        return HEADER_BYTES + -(-self.tokens * self.token_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.offsets_at + self.documents * OFFSET_TYPE.itemsize

    def pack(self) -> bytes:
        """Return the header's 128 bytes."""
        fields = FIELDS.pack(
            MAGIC, VERSION, self.token_bytes, self.tokens, self.documents, self.vocabulary,
            self.payload_sha256, self.tokenizer_sha256,
        )  # fmt: skip
        return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, source: Path) -> Header:
        """Return the header in `data`. Raises DataError for anything that `pack` does not write."""
        if data[: len(MAGIC)] != MAGIC:
            what = "is empty" if not data else "is not a token file"
            raise DataError(f"{source} {what}; {REMEDY}")
        if len(data) < HEADER_BYTES:
            raise DataError(f"{source} is truncated: {len(data)} bytes, less than its header; {REMEDY}")
        _, version, *rest = FIELDS.unpack_from(data)
        if version != VERSION:
            raise DataError(f"{source} has version {version} of the token format, not {VERSION}; {REMEDY}")
        header = cls(*rest)
        if header.token_bytes not in TOKEN_TYPES or data[:HEADER_BYTES] != header.pack():
            raise DataError(f"{source} is damaged: its header does not match its checksum; {REMEDY}")
        return header


class TokenFileWriter:
    """Write a token file document by document; it appears under its name only when it is whole.

    Use as a context manager: leaving it normally finishes the file, an exception removes it. Memory does not
    grow with the tokens or the documents.
    """

    def __init__(self, path: Path, vocabulary: int, tokenizer_fingerprint: str) -> None:
        token_bytes = 2 if vocabulary <= 1 << 16 else 4
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._header = Header(token_bytes, 0, 0, vocabulary, bytes(32), bytes.fromhex(tokenizer_fingerprint))
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = open(self._partial, "wb")  # noqa: SIM115, closed by __exit__
        self._offsets: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115, closed by __exit__
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: NDArray[Any]) -> None:
        """Add one document, a one-dimensional array of ids, each in [0, vocabulary); it must not be empty."""
        assert tokens.ndim == 1 and len(tokens), f"a document has the shape {tokens.shape}"
        low, high = int(tokens.min()), int(tokens.max())
        assert low >= 0 and high < self._header.vocabulary, (
            f"token ids {low} to {high} do not fit a vocabulary of {self._header.vocabulary}"
        )
        data = tokens.astype(TOKEN_TYPES[self._header.token_bytes]).tobytes()
        self._offsets.write(struct.pack("<q", self._header.tokens))
        self._write(data)
        self._header = replace(
            self._header, tokens=self._header.tokens + len(tokens), documents=self._header.documents + 1
        )

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._header.tokens

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return self._header.documents

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def _finish(self) -> None:
        self._write(bytes(self._header.offsets_at - self._file.tell()))
        self._offsets.seek(0)
        while data := self._offsets.read(COPY_BYTES):
            self._write(data)
        self._file.seek(0)
        self._file.write(replace(self._header, payload_sha256=self._digest.digest()).pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        sync_directory(self._path.parent)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._offsets.close()
            self._partial.unlink(missing_ok=True)


class TokenFile:
    """A token file, open for reading.

    `tokens`: memory map of uint16 or uint32 [tokens]. `offsets`: int64 [documents], each document's first
    token.
    """

    def __init__(self, path: str | Path) -> None:
        """Check the header and size, and map the file; `verify` checks the payload. Raises DataError."""
        self.path = Path(path)
        try:
            require_regular(self.path)
            with open(self.path, "rb") as stream:
                self.header = Header.unpack(stream.read(HEADER_BYTES), self.path)
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise DataError(f"cannot read token file {self.path}: {error.strerror}; {REMEDY}") from error
        if size != self.header.file_bytes:
            how = "truncated" if size < self.header.file_bytes else "too long"
            raise DataError(f"{self.path} is {how}: {size} bytes, not {self.header.file_bytes}; {REMEDY}")
        if not self.header.documents:
            raise DataError(f"{self.path} holds no documents; {REMEDY}")
        token_type = TOKEN_TYPES[self.header.token_bytes]
        self.tokens: NDArray[Any] = np.memmap(self.path, token_type, "r", HEADER_BYTES, (self.header.tokens,))
        self.offsets: NDArray[np.int64] = np.memmap(
            self.path, OFFSET_TYPE, "r", self.header.offsets_at, (self.header.documents,)
        )

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.header.tokens

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.header.documents

    @property
    def vocabulary(self) -> int:
        """Every token id is below this."""
        return self.header.vocabulary

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and the document index, in hexadecimal."""
        return self.header.payload_sha256.hex()

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer that made the tokens."""
        return self.header.tokenizer_sha256.hex()

    def document(self, number: int) -> NDArray[Any]:
        """Return the tokens of one document, from its end-of-text token to before the next document's."""
        assert 0 <= number < self.documents, f"document {number} of {self.documents}"
        end = self.offsets[number + 1] if number + 1 < self.documents else len(self)
        return self.tokens[self.offsets[number] : end]

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Return int64 [length] tokens from `start`. Raises DataError for an id outside the vocabulary."""
        assert start >= 0 and start + length <= len(self), f"tokens {start}+{length} of {len(self)}"
        tokens = self.tokens[start : start + length].astype(np.int64)
        if int(tokens.max()) >= self.vocabulary:
            raise DataError(
                f"{self.path} is damaged: token {int(tokens.max())} near position {start} is outside its "
                f"vocabulary of {self.vocabulary}; {REMEDY}"
            )
        return tokens

    def verify(self) -> None:
        """Read the whole payload. Raises DataError if it does not match its SHA-256."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as stream:
            stream.seek(HEADER_BYTES)
            while data := stream.read(COPY_BYTES):
                digest.update(data)
        if digest.digest() != self.header.payload_sha256:
            raise DataError(f"{self.path} is damaged: its tokens do not match their checksum; {REMEDY}")
