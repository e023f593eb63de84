"""One safetensors file: written in one pass with its checksums, read by byte ranges.

Owns: the safetensors layout (8-byte little-endian header length, JSON header, raw little-endian bytes) and
bounded memory on both ways. What the tensors mean is `manifest.py`'s; checksums are those of `blocks.py`. The
`safetensors` library reads these files too; it is not used here because it hands out neither a checksum while writing
nor reads into a given buffer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint.blocks import (
    BLOCK_BYTES,
    DAMAGED,
    DIGEST_BYTES,
    BlockCache,
    Bytes,
    CheckedFile,
    FileRecord,
    WrittenDigests,
    open_regular,
    unreadable,
)
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.geometry import StridedCopy
from megalm.errors import DamagedCheckpoint

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

CHUNK_BYTES = 2 << 20  # of one write, and of one read: the bound on extra memory for each that is under way
BEGIN_BYTES = 16 << 20  # that are written before the disk is told to begin
DIRECT_BYTES = 128 << 10  # runs at least this long are read straight into place
HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own limit
DIGESTS = "block-digests"  # the last tensor of a file


def as_bytes(tensor: Tensor) -> Bytes:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def write_tensor_file(
    files: FileSystem,
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    hashers: ThreadPoolExecutor,
) -> FileRecord:
    """Write 1-D `tensors` to the new safetensors file `path`; its bytes are on the disk on return.

    Each tensor goes to the host in chunks of 2 MiB; `hashers` compute the checksums of some while others are
    written. Raises OSError.
    """
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())  # keeps every tensor aligned
    head = _header(tensors, metadata)
    digests = WrittenDigests(hashers)
    descriptor = files.create(path)
    size = begun = 0
    try:
        for chunk in _joined([memoryview(head)], _chunks(tensors)):
            digests.update(chunk)
            files.write(descriptor, chunk)
            size += len(chunk)
            if size - begun >= BEGIN_BYTES:
                files.begin_sync(descriptor, begun, size - begun)
                begun = size
        ending = digests.finish()
        files.write(descriptor, ending)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    return FileRecord(path.name, size + len(ending), blocks=hashlib.sha256(ending).hexdigest())


def _header(tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Return a file's first bytes, up to the first tensor's values."""
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
    blocks = 0
    while True:  # the header says how many blocks there are, and is in them
        count = blocks * DIGEST_BYTES
        header[DIGESTS] = {"dtype": "U8", "shape": [count], "data_offsets": [offset, offset + count]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        needed = -(-(8 + len(text) + offset) // BLOCK_BYTES)
        if needed == blocks:
            return len(text).to_bytes(8, "little") + text
        blocks = max(needed, blocks + 1)


def _chunks(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[memoryview]:
    for _, tensor in tensors:
        for chunk in torch.split(tensor.detach(), max(1, CHUNK_BYTES // tensor.element_size())):
            if chunk.numel():
                yield as_bytes(chunk.contiguous().cpu()).data


def _joined(*parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yield the same bytes with short chunks joined: each costs a call of the system and two of other threads."""
    short = bytearray()
    for chunk in itertools.chain(*parts):
        if len(chunk) < DIRECT_BYTES:
            short += chunk
        if short and (len(chunk) >= DIRECT_BYTES or len(short) >= CHUNK_BYTES):
            yield memoryview(short)
            short = bytearray()
        if len(chunk) >= DIRECT_BYTES:
            yield chunk
    if short:
        yield memoryview(short)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: where its bytes lie, counted from the start of the file."""

    offset: int
    count: int
    dtype: torch.dtype


class TensorFile:
    """The header of one safetensors file, and reads of parts of its tensors; every byte that is used is checked."""

    def __init__(self, path: Path, record: FileRecord, cache: BlockCache) -> None:
        """Read and check the header. Raises CheckpointError."""
        self.path = path
        try:
            self._file = CheckedFile(path, record, cache)
            with open_regular(path) as file:
                self.tensors = self._parse(*self._header(file.fileno()))
        except OSError as error:
            raise unreadable(path, error) from error

    def _header(self, descriptor: int) -> tuple[bytes, int]:
        """Return the header's text and where the tensors' bytes begin."""
        size = self._file.size
        prefix, length = np.zeros(8, np.uint8), 0
        if self._file.end >= 8:
            self._file.fill(descriptor, 0, prefix)
            length = int.from_bytes(prefix.tobytes(), "little")
        if not 2 <= length <= min(self._file.end - 8, HEADER_LIMIT_BYTES):
            raise DamagedCheckpoint(f"{self.path}: header of {length} bytes in a file of {size}; {DAMAGED}")
        text = np.empty(length, np.uint8)
        self._file.fill(descriptor, 8, text)
        return text.tobytes(), 8 + length

    def _parse(self, text: bytes, base: int) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        try:
            end = base
            for key, value in sorted(json.loads(text, object_pairs_hook=_once).items(), key=_first_byte):
                if key == "__metadata__":
                    continue
                (count,), (start, stop) = value["shape"], value["data_offsets"]
                dtype = DTYPES[value["dtype"]]
                if not (0 <= start <= stop <= self._file.size - base and stop - start == count * dtype.itemsize):
                    raise ValueError(f"{key}: offsets {start}:{stop} for {count} of {value['dtype']}")
                if base + start < end:
                    raise ValueError(f"{key}: begins at {start}, inside of another tensor")
                end = base + stop
                tensors[key] = StoredTensor(base + start, count, dtype)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpoint(
                f"{self.path}: not a header that this program writes ({error}); {DAMAGED}"
            ) from error
        return tensors

    def plan(self, key: str, copies: Iterable[StridedCopy], out: Tensor) -> Iterator[Read]:
        """Yield the reads that bring parts of the tensor `key` into `out` (1-D, contiguous, CPU).

        Offsets of `copies` are elements of the stored tensor and of `out`. Only the blocks in which the copies, and
        short gaps between them, lie are read. Raises CheckpointError.
        """
        stored = self.tensors.get(key)
        if stored is None:
            raise DamagedCheckpoint(f"{self.path}: no tensor {key!r}, which the manifest names; {DAMAGED}")
        if stored.dtype != out.dtype:
            raise DamagedCheckpoint(f"{self.path}: {key!r} is {stored.dtype}, not {out.dtype} as listed; {DAMAGED}")
        target = as_bytes(out)
        for copy in copies:
            end = copy.source + (copy.repeat - 1) * copy.source_step + copy.length
            if end > stored.count:
                raise DamagedCheckpoint(f"{self.path}: {key!r} ends before element {end}; {DAMAGED}")
            for part in _parts(_in_bytes(copy, stored.offset, out.element_size())):
                yield Read(self._file, part, target)


@dataclass(frozen=True, slots=True)
class Read:
    """One strided copy, in bytes, from a file to `out`: of about 2 MiB at most, its gaps counted."""

    file: CheckedFile
    copy: StridedCopy
    out: Bytes

    @property
    def span(self) -> int:
        """The bytes from the first one to the last."""
        return (self.copy.repeat - 1) * self.copy.source_step + self.copy.length

    def run(self, descriptor: int) -> None:
        """Read, from the open file. Raises CheckpointError, OSError."""
        copy = self.copy
        if copy.repeat == 1:
            self.file.fill(descriptor, copy.source, self.out[copy.target : copy.target + copy.length])
            return
        block = np.empty(self.span, np.uint8)
        self.file.fill(descriptor, copy.source, block)
        shape = (copy.repeat, copy.length)
        strided = np.lib.stride_tricks.as_strided
        rows = strided(self.out[copy.target :], shape, (copy.target_step, 1))
        rows[:] = strided(block, shape, (copy.source_step, 1))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a key that is there twice, of which readers may take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _first_byte(item: tuple[str, Any]) -> tuple[int, int]:
    """Return where a tensor of a header begins and ends, to sort by; what describes none comes first."""
    return (-1, -1) if item[0] == "__metadata__" else tuple(item[1]["data_offsets"])


def _in_bytes(copy: StridedCopy, offset: int, width: int) -> StridedCopy:
    source, target, length, repeat, source_step, target_step = copy
    return StridedCopy(
        offset + source * width, target * width, length * width, repeat, source_step * width, target_step * width
    )


def _parts(copy: StridedCopy) -> Iterator[StridedCopy]:
    """Cut a strided copy, in bytes: long or distant runs one by one, others into some rows with their gaps."""
    sparse = copy.source_step > 8 * copy.length and copy.source_step > DIRECT_BYTES // 2
    if copy.repeat == 1 or copy.length >= DIRECT_BYTES or sparse:
        for index in range(copy.repeat):
            source, stop = copy.source + index * copy.source_step, copy.source + index * copy.source_step + copy.length
            target = copy.target + index * copy.target_step
            while source < stop:
                edge = min(stop, source // CHUNK_BYTES * CHUNK_BYTES + CHUNK_BYTES)  # where a block ends
                yield StridedCopy(source, target, edge - source, 1, 0, 0)
                source, target = edge, target + edge - source
        return
    per_part = max(1, CHUNK_BYTES // copy.source_step)
    for first in range(0, copy.repeat, per_part):
        source, target = copy.source + first * copy.source_step, copy.target + first * copy.target_step
        yield copy._replace(source=source, target=target, repeat=min(per_part, copy.repeat - first))
