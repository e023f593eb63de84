"""Files of `torch.save` and pickles, read without torch.load and without pickle: their values, and tensors on demand.

Owns the process of `confinement` as seen from outside: it gets open files and gives back JSON, which is checked like
any other input. Tensors are read here, from the byte ranges that it names, when they are wanted.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from megalm.checkpoint.blocks import open_regular, read_exactly
from megalm.checkpoint.tensor_file import DTYPES
from megalm.errors import CheckpointError

logger = logging.getLogger(__name__)

_FILES_A_PROCESS = 200
_PIECES_A_PROCESS = 1000
_MOST_ANSWER_BYTES = 256 << 20
_SECONDS = 900
_CHUNK_BYTES = 8 << 20
_PROGRAM = "import sys; sys.path.append({root!r}); from megalm.models.foreign.confinement import main; main()"
MAPPING = "builtins.dict"
SHARED = "elements that share memory"
ABOUT = "it is read by its opcodes, nothing in it is run"


class Piece(NamedTuple):
    """A part of a file that torch.save wrote (None: all of it); `alone`: a pickle without torch's archive."""

    path: Path
    first: int = 0
    size: int | None = None
    alone: bool = False


@dataclass(frozen=True)
class Opaque:
    """Something that a pickle names and that is not made here: the name alone, with what it was to be made of."""

    name: str
    arguments: Any = None
    state: Any = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file: bytes [first, first + size), of which it is a view.

    `crc` is the CRC-32 of these bytes (0: not known), and `checked` has the first bytes of those that were compared.
    """

    path: Path
    dtype: torch.dtype
    first: int
    size: int
    crc: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    checked: set[int] = field(repr=False, compare=False)

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))

    def problem(self, file_bytes: int) -> str | None:
        """Return what is wrong with it; None: its elements are inside its bytes, each once."""
        numbers = (self.first, self.size, self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(number < 0 for number in numbers):
            return "negative numbers, or as many lengths as strides are not there"
        if self.first + self.size > file_bytes:
            return f"bytes up to {self.first + self.size} of a file of {file_bytes}"
        if (self.offset + self.extent) * self.dtype.itemsize > self.size:
            return f"elements up to {self.offset + self.extent} of a storage of {self.size // self.dtype.itemsize}"
        span = 1
        for stride, length in sorted(zip(self.strides, self.shape, strict=True)):
            if length > 1:
                if stride < span:
                    return SHARED
                span = (length - 1) * stride + span
        return None

    def _check(self, descriptor: int) -> None:
        """Raise CheckpointError for bytes that are not as they were written."""
        if self.crc == 0 or self.first in self.checked:
            return
        found, stop = 0, self.first + self.size
        for start in range(self.first, stop, _CHUNK_BYTES):
            found = zlib.crc32(read_exactly(descriptor, self.path, start, min(_CHUNK_BYTES, stop - start)), found)
        if found != self.crc:
            where = f"bytes {self.first} to {stop} have not the CRC-32 with which they were written"
            raise CheckpointError(f"{self.path}: {where}; the file is damaged: copy it again")
        self.checked.add(self.first)

    def read(self) -> Tensor:
        """Return the tensor, contiguous, in the host's memory. Raises CheckpointError."""
        if prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        width = self.dtype.itemsize
        with open_regular(self.path) as file:
            self._check(file.fileno())
            start = self.first + self.offset * width
            data = read_exactly(file.fileno(), self.path, start, self.extent * width)
        flat = torch.frombuffer(bytearray(data), dtype=self.dtype)
        return flat.as_strided(self.shape, self.strides).contiguous()


def read_files(pieces: Sequence[Piece]) -> list[Any]:
    """Return what files hold: None, numbers, text, bytes (zeros), list, dict, `StoredTensor` and `Opaque`.

    A mapping whose keys are other than text and numbers is an `Opaque` of its pairs. Raises CheckpointError for links,
    for files that torch.save does not write, and for those that want more than a checkpoint needs.
    """
    found: list[Any] = []
    while len(found) < len(pieces):
        batch, paths = [], set[Path]()
        for piece in pieces[len(found) : len(found) + _PIECES_A_PROCESS]:
            paths.add(piece.path)
            if len(paths) > _FILES_A_PROCESS:
                break
            batch.append(piece)
        found += _read_batch(batch)
    return found


def read_file(path: Path, alone: bool = False) -> Any:
    """Return what one file holds, as `read_files`."""
    return read_files([Piece(path, alone=alone)])[0]


def _read_batch(pieces: Sequence[Piece]) -> list[Any]:
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in dict.fromkeys(piece.path for piece in pieces)}
        sizes = {path: os.fstat(file.fileno()).st_size for path, file in files.items()}
        requests = []
        for piece in pieces:
            size = sizes[piece.path] - piece.first if piece.size is None else piece.size
            if not 0 <= piece.first <= piece.first + size <= sizes[piece.path]:
                raise CheckpointError(f"{piece.path}: bytes {piece.first} to {piece.first + size} are not in it")
            requests.append([files[piece.path].fileno(), piece.first, size, piece.alone])
        lines = _ask(requests)
    values = []
    for piece, line in zip(pieces, lines, strict=True):
        if "refused" in line:
            raise CheckpointError(f"{piece.path}: {str(line['refused'])[:400]}; {ABOUT}")
        try:
            values.append(_Decoder(piece.path, sizes[piece.path]).decode(line["contents"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{piece.path}: its reader gave no sense ({error}); nothing was imported") from error
    return values


def _open(path: Path) -> IO[bytes]:
    """Open a file of the checkpoint for reading; a link in its place, or in that of its directory, is refused."""
    try:
        if path.parent.is_symlink() or path.is_symlink():
            raise CheckpointError(f"{path}: a symbolic link, which is not followed; put the file itself there")
        file: IO[bytes] = open_regular(path)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise CheckpointError(f"{path}: not a file; name a directory of checkpoints")
        return file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); name another directory") from error


def _ask(requests: list[list[Any]]) -> list[Any]:
    """Return the answers of a process of its own, which has nothing but the files that are open."""
    program = _PROGRAM.format(root=str(Path(__file__).resolve().parents[3]))
    command = [sys.executable, "-I", "-S", "-B", "-c", program, json.dumps(requests)]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={},
            cwd="/",
            pass_fds=[request[0] for request in requests],
        )
        assert process.stdout is not None
        try:
            answer = process.stdout.read(_MOST_ANSWER_BYTES)
            too_long = process.stdout.read(1)
            status = process.wait(_SECONDS) if not too_long else None
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if status != 0:
            complaints.seek(0)
            said = complaints.read(4000).decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise CheckpointError(f"the process that reads pickles ended with {status} ({said}); nothing was imported")
    try:
        about, *lines = [json.loads(line) for line in answer.splitlines()]
        if about["left"]:
            logger.warning("the process that reads pickles is confined but for this: %s", about["left"])
        if len(lines) != len(requests):
            raise ValueError(f"{len(lines)} answers to {len(requests)} questions")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the process that reads pickles gave no sense ({error}); nothing imported") from error
    return lines


class _Decoder:
    """Turns the values of `opcodes.Encoder` into Python's, checking each, as what wrote them is not trusted."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        self._path, self._file_bytes = path, file_bytes
        self._checked: set[int] = set()

    def decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "list":
            return [self.decode(item) for item in content]
        if kind == "dict":
            pairs = [(self.decode(key), self.decode(item)) for key, item in content]
            plain = all(isinstance(key, str | int | float) for key, _ in pairs)
            return dict(pairs) if plain else Opaque(MAPPING, pairs)
        if kind == "bytes":
            return b"\0" * min(int(content), 64)
        if kind == "object":
            name, arguments, state = content
            return Opaque(str(name), self.decode(arguments), self.decode(state))
        if kind == "tensor":
            return self._tensor(*content)
        raise ValueError(f"a value of kind {kind}")

    def _tensor(self, dtype: Any, first: Any, size: Any, crc: Any, offset: Any, shape: Any, strides: Any) -> Any:
        if dtype not in DTYPES:
            return Opaque("a tensor of a dtype that is not read")
        if any(type(number) is not int for number in (first, size, crc, offset, *shape, *strides)):
            raise ValueError("a tensor without whole numbers")
        tensor = StoredTensor(
            self._path, DTYPES[dtype], first, size, crc, offset, tuple(shape), tuple(strides), self._checked
        )
        problem = tensor.problem(self._file_bytes)
        if problem == SHARED:  # an expanded one, say, which is no weight
            return Opaque(f"a tensor of {problem}")
        if problem:
            raise CheckpointError(f"{self._path}: a tensor of shape {list(shape)} has {problem}; nothing was imported")
        return tensor
