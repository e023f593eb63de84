"""One safetensors file: written in one pass with its SHA-256, read by byte ranges.

Owns: the safetensors layout (8-byte little-endian header length, JSON header, raw little-endian bytes) and
bounded memory on both ways. What the tensors mean is `manifest.py`'s. The `safetensors` library reads these
files too; it is not used here because it hands out neither a checksum while writing nor reads into a given
buffer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.geometry import StridedCopy
from megalm.errors import CheckpointError
from megalm.files import require_regular

Bytes = npt.NDArray[np.uint8]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK_BYTES = 8 << 20  # of one write, one hash update and one read of short runs: the bound on extra memory
DIRECT_BYTES = 128 << 10  # runs at least this long are read straight into place
HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own limit
DAMAGED = "the file is damaged; delete this checkpoint to resume from an older one, or restore it from a copy"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file."""

    name: str
    size: int
    sha256: str


def as_bytes(tensor: Tensor) -> Bytes:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def write_tensor_file(
    files: FileSystem,
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    hasher: Executor,
) -> FileRecord:
    """Write 1-D `tensors` to the new safetensors file `path`; its bytes are on the disk on return.

    Each tensor goes to the host in blocks of 8 MiB; `hasher` computes the checksum of a block while it is
    written. Raises OSError.
    """
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors:
        stop = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    descriptor = files.create(path)

    def put(block: bytes | memoryview) -> None:
        hashed = hasher.submit(digest.update, block)
        try:
            files.write(descriptor, block)
        finally:
            hashed.result()

    try:
        put(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            for block in torch.split(tensor.detach(), max(1, BLOCK_BYTES // tensor.element_size())):
                if block.numel():
                    put(as_bytes(block.contiguous().cpu()).data)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    return FileRecord(path.name, 8 + len(text) + offset, digest.hexdigest())


def hash_file(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless the file at `path` is the one that `record` describes."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK_BYTES // 8)
    view = memoryview(buffer)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                raise CheckpointError(f"{path}: {size} bytes where the manifest has {record.size}; {DAMAGED}")
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise unreadable(path, error) from error
    if digest.hexdigest() != record.sha256:
        raise CheckpointError(f"{path}: SHA-256 {digest.hexdigest()[:12]}... is not the manifest's; {DAMAGED}")


def open_regular(path: Path) -> Any:
    """Open `path` for unbuffered reading; a link, pipe or device in its place is refused (OSError)."""
    require_regular(path)
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the one-line error for a file that the system would not read."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: the file is missing; {DAMAGED.partition('; ')[2]}")
    return CheckpointError(f"{path}: cannot read: {error.strerror or error}; check the file system and permissions")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: where its bytes lie, counted from the start of the file."""

    offset: int
    count: int
    dtype: torch.dtype


class TensorFile:
    """The header of one safetensors file, and reads of parts of its tensors."""

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises CheckpointError."""
        self.path = path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT_BYTES):
                    raise CheckpointError(f"{path}: header of {length} bytes in a file of {size}; {DAMAGED}")
                self.tensors = self._parse(read_exactly(file.fileno(), path, 8, length), 8 + length, size)
        except OSError as error:
            raise unreadable(path, error) from error

    def _parse(self, text: bytes, base: int, size: int) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        try:
            for key, value in json.loads(text).items():
                if key == "__metadata__":
                    continue
                (count,), (start, stop) = value["shape"], value["data_offsets"]
                dtype = DTYPES[value["dtype"]]
                if not (0 <= start <= stop <= size - base and stop - start == count * dtype.itemsize):
                    raise ValueError(f"{key}: offsets {start}:{stop} for {count} of {value['dtype']}")
                tensors[key] = StoredTensor(base + start, count, dtype)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: not a header that this program writes ({error}); {DAMAGED}") from error
        return tensors

    def read(self, key: str, copies: Iterable[StridedCopy], out: Tensor) -> int:
        """Read parts of the tensor `key` into `out` (1-D, contiguous, CPU); return the number of elements.

        Offsets of `copies` are elements of the stored tensor and of `out`. Only the bytes of the
        copies are read, and short gaps between them. Raises CheckpointError.
        """
        stored = self.tensors.get(key)
        if stored is None:
            raise CheckpointError(f"{self.path}: no tensor {key!r}, which the manifest names; {DAMAGED}")
        if stored.dtype != out.dtype:
            raise CheckpointError(f"{self.path}: {key!r} is {stored.dtype}, not {out.dtype} as listed; {DAMAGED}")
        total = 0
        try:
            with open_regular(self.path) as file:
                for copy in copies:
                    end = copy.source + (copy.repeat - 1) * copy.source_step + copy.length
                    if end > stored.count:
                        raise CheckpointError(f"{self.path}: {key!r} ends before element {end}; {DAMAGED}")
                    _copy(
                        file.fileno(),
                        self.path,
                        stored.offset,
                        _in_bytes(copy, out.element_size()),
                        as_bytes(out),
                    )
                    total += copy.length * copy.repeat
        except OSError as error:
            raise unreadable(self.path, error) from error
        return total


def _in_bytes(copy: StridedCopy, width: int) -> StridedCopy:
    source, target, length, repeat, source_step, target_step = copy
    return StridedCopy(source * width, target * width, length * width, repeat, source_step * width, target_step * width)


def _copy(descriptor: int, path: Path, offset: int, copy: StridedCopy, out: Bytes) -> None:
    """Read one strided copy, in bytes: long or distant runs one by one, others in blocks with their gaps."""
    sparse = copy.source_step > 8 * copy.length and copy.source_step > DIRECT_BYTES // 2
    if copy.repeat == 1 or copy.length >= DIRECT_BYTES or sparse:
        for index in range(copy.repeat):
            target = copy.target + index * copy.target_step
            start = offset + copy.source + index * copy.source_step
            read_into(descriptor, path, start, out[target : target + copy.length])
        return
    per_block = max(1, BLOCK_BYTES // copy.source_step)
    for first in range(0, copy.repeat, per_block):
        rows = min(per_block, copy.repeat - first)
        span = (rows - 1) * copy.source_step + copy.length
        block = np.empty(span, np.uint8)
        read_into(descriptor, path, offset + copy.source + first * copy.source_step, block)
        shape = (rows, copy.length)
        rest = out[copy.target + first * copy.target_step :]
        strided = np.lib.stride_tricks.as_strided
        strided(rest, shape, (copy.target_step, 1))[:] = strided(block, shape, (copy.source_step, 1))


def read_into(descriptor: int, path: Path, offset: int, out: Bytes) -> None:
    """Fill `out` from the file's bytes at `offset`. Raises CheckpointError where the file ends before."""
    view, done = out.data, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {offset + done}, before byte {offset + len(view)}; {DAMAGED}")
        done += count


def read_exactly(descriptor: int, path: Path, offset: int, count: int) -> bytes:
    """Return `count` bytes at `offset`. Raises CheckpointError where the file ends before."""
    out = np.empty(count, np.uint8)
    read_into(descriptor, path, offset, out)
    return out.tobytes()
