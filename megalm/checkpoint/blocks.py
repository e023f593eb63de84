"""The checksums of a file: the SHA-256 of each of its blocks.

A reader that needs a part of a file checks the blocks of that part, in the buffer that it reads them into: nothing is
read twice, and nothing that was checked can change before it is used. Blocks do not wait for each other, so that
several threads hash a file that is written. Their digests stand at its end, and the manifest has the SHA-256 of these,
so that its size does not depend on theirs.

Owns: blocks, their digests while a file is written, and reads that are checked. What the bytes mean is
`tensor_file.py`'s.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.errors import CheckpointError, DamagedCheckpoint
from megalm.files import require_regular

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 256 << 10  # a part of the format: small pieces of many files are read at the price of a block each
DIGEST_BYTES = 32
CACHE_BYTES = 128 << 20  # of blocks that were wanted in part: who reads tensor by tensor wants their rest soon
AHEAD_BYTES = 16 << 20  # that the system reads before they are asked for
HASH_THREADS = 2  # of a rank that writes: 2.7 GB/s of SHA-256
IN_FLIGHT = 8  # buffers that are written, but not yet hashed
REMEDY = "; delete this checkpoint to resume from an older one, or restore it from a copy"
DAMAGED = f"the file is damaged{REMEDY}"
_DAMAGE = {
    *(errno.ENOENT, errno.EIO, errno.EUCLEAN, errno.EBADMSG),  # the latter two: a file system's own checksums
    *(errno.EINVAL, errno.ENXIO, errno.ELOOP, errno.EISDIR, errno.ENOTDIR),  # something else is in the file's place
}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file: the SHA-256 of all its bytes, or that of its blocks' digests, or both."""

    name: str
    size: int
    sha256: str | None = None
    blocks: str | None = None

    def to_json(self) -> list[Any]:
        """Return the record as JSON values."""
        return [self.sha256, self.size, self.name, *([] if self.blocks is None else [self.blocks])]

    @classmethod
    def from_json(cls, value: list[Any]) -> FileRecord:
        """Return the record that `to_json` wrote. Raises TypeError, ValueError."""
        sha256, size, name, *blocks = value
        digests = [digest for digest in (sha256, *blocks) if digest is not None]
        if type(size) is not int or size < 0 or len(blocks) > 1 or not digests or not all(map(_is_digest, digests)):
            raise ValueError(f"record {str(value)[:200]}")
        return cls(name, size, sha256, *blocks)

    @property
    def block_count(self) -> int:
        """The number of blocks, whose digests are the last bytes of the file."""
        return 0 if self.blocks is None else -(-self.size // (BLOCK_BYTES + DIGEST_BYTES))

    @property
    def end(self) -> int:
        """Where the blocks end and their digests begin."""
        return self.size - DIGEST_BYTES * self.block_count


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 2 * DIGEST_BYTES


class WrittenDigests:
    """The digests of one file's blocks while its bytes are written."""

    def __init__(self, hashers: ThreadPoolExecutor) -> None:
        self._hashers = hashers
        self._block: list[memoryview] = []
        self._missing = BLOCK_BYTES  # of the block that is not full yet
        self._waiting: deque[Future[bytes]] = deque()
        self._digests: list[bytes] = []

    def update(self, data: bytes | memoryview) -> None:
        """Hash the next bytes, in other threads: they must stay as they are until `finish`."""
        rest, full = memoryview(data), []
        while rest:
            part, rest = rest[: self._missing], rest[self._missing :]
            self._block.append(part)
            self._missing -= len(part)
            if not self._missing:
                full.append(self._block)
                self._block, self._missing = [], BLOCK_BYTES
        if full:
            self._waiting.append(self._hashers.submit(_digests, full))
        if len(self._waiting) > IN_FLIGHT:
            self._digests.append(self._waiting.popleft().result())

    def finish(self) -> bytes:
        """Return the digests of all blocks, which are to be the file's last bytes."""
        if self._block:
            self._waiting.append(self._hashers.submit(_digests, [self._block]))
            self._block = []
        self._digests += [one.result() for one in self._waiting]
        self._waiting.clear()
        return b"".join(self._digests)


def _digests(blocks: list[list[memoryview]]) -> bytes:
    """Return the digests of blocks, given in parts, one behind the other. Hashing holds no GIL."""
    found = []
    for parts in blocks:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        found.append(digest.digest())
    return b"".join(found)


class BlockCache:
    """Checked blocks of which others may still want a part; the least recently used ones go. Any thread may call."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit, self._lock = limit_bytes // BLOCK_BYTES, Lock()
        self._blocks: OrderedDict[tuple[str, int], Bytes] = OrderedDict()

    def get(self, name: str, index: int) -> Bytes | None:
        """Return a block's bytes, which nobody may change, or None."""
        with self._lock:
            if (name, index) in self._blocks:
                self._blocks.move_to_end((name, index))
            return self._blocks.get((name, index))

    def put(self, name: str, index: int, block: Bytes) -> None:
        """Keep a block."""
        with self._lock:
            self._blocks[name, index] = block
            while len(self._blocks) > self._limit:
                self._blocks.popitem(last=False)


class CheckedFile:
    """Reads of any bytes of a file before its digests, each block of which is first compared with its digest."""

    def __init__(self, path: Path, record: FileRecord, cache: BlockCache) -> None:
        """Read the digests, if `record` has any; without, nothing is checked here. Raises CheckpointError, OSError."""
        self.path, self._record, self._cache = path, record, cache
        with open_regular(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size != record.size:
                raise DamagedCheckpoint(f"{path}: {self.size} bytes where the manifest has {record.size}; {DAMAGED}")
            digests = read_exactly(file.fileno(), path, record.end, self.size - record.end)
        if record.blocks is not None and hashlib.sha256(digests).hexdigest() != record.blocks:
            raise DamagedCheckpoint(f"{path}: its blocks' digests have not the manifest's SHA-256; {DAMAGED}")
        self._digests = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
        self.end = record.end
        self._expected = 0

    def expect(self, descriptor: int, start: int, stop: int) -> None:
        """Be told of the bytes from which the next reads are. Where they follow the last ones, as in a load of the same
        layout, the system begins to read what comes behind them too, so that the disk does not wait for who hashes.
        """
        if 0 <= start - self._expected <= BLOCK_BYTES:
            os.posix_fadvise(descriptor, stop, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        self._expected = stop

    def fill(self, descriptor: int, offset: int, out: Bytes) -> None:
        """Fill `out` from the file's bytes at `offset`, checked. Raises CheckpointError, OSError."""
        stop = offset + len(out)
        if stop > self.end:
            raise DamagedCheckpoint(f"{self.path}: ends at byte {self.end}, before byte {stop}; {DAMAGED}")
        if self._record.blocks is None:
            read_into(descriptor, self.path, offset, out)
            return
        first, last = -(-offset // BLOCK_BYTES), stop // BLOCK_BYTES if stop < self.end else len(self._digests)
        low, high = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.end)
        if low < high:
            whole = out[low - offset : high - offset]
            read_into(descriptor, self.path, low, whole)
            for index in range(first, last):
                self._check(index, whole[(index - first) * BLOCK_BYTES :][:BLOCK_BYTES])
        else:
            low = high = min(stop, low)
        for begin, end in ((offset, low), (high, stop)):
            if begin < end:
                block = self._part(descriptor, begin // BLOCK_BYTES)
                at = begin % BLOCK_BYTES
                out[begin - offset : end - offset] = block[at : at + end - begin]

    def _part(self, descriptor: int, index: int) -> Bytes:
        """Return a block that is wanted in part."""
        block = self._cache.get(self.path.name, index)
        if block is None:
            start = index * BLOCK_BYTES
            block = np.empty(min(BLOCK_BYTES, self.end - start), np.uint8)
            read_into(descriptor, self.path, start, block)
            self._check(index, block)
            self._cache.put(self.path.name, index, block)
        return block

    def _check(self, index: int, block: Bytes) -> None:
        if hashlib.sha256(block.data).digest() != self._digests[index]:
            start = index * BLOCK_BYTES
            where = f"bytes {start} to {start + len(block)}"
            raise DamagedCheckpoint(f"{self.path}: {where} have another SHA-256 than when they were written; {DAMAGED}")


def hash_file(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless every byte of the file at `path` is as `record` says."""
    whole, buffer = hashlib.sha256(), np.empty(BLOCK_BYTES, np.uint8)
    try:
        file = CheckedFile(path, record, BlockCache(0))
        with open_regular(path) as opened:
            for start in range(0, file.end, BLOCK_BYTES):
                part = buffer[: min(BLOCK_BYTES, file.end - start)]
                file.fill(opened.fileno(), start, part)
                if record.sha256 is not None:
                    whole.update(part.data)
            if record.sha256 is not None:
                whole.update(read_exactly(opened.fileno(), path, file.end, file.size - file.end))
    except OSError as error:
        raise unreadable(path, error) from error
    if record.sha256 is not None and whole.hexdigest() != record.sha256:
        raise DamagedCheckpoint(f"{path}: SHA-256 {whole.hexdigest()[:12]}... is not the manifest's; {DAMAGED}")


def open_regular(path: Path) -> Any:
    """Open `path` for unbuffered reading; a link, pipe or device in its place is refused (OSError)."""
    require_regular(path)
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the one-line error for a file that the system would not read: damage where its bytes are not there.

    All else, such as memory or a server that is short for a while, may be over soon: a checkpoint that was passed over
    for that would be replaced by older work.
    """
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpoint(f"{path}: the file is missing; {REMEDY[2:]}")
    kind = DamagedCheckpoint if error.errno in _DAMAGE else CheckpointError
    return kind(f"{path}: cannot read: {error.strerror or error}; check the file system and permissions")


def read_into(descriptor: int, path: Path, offset: int, out: Bytes) -> None:
    """Fill `out` from the file's bytes at `offset`. Raises CheckpointError where the file ends before."""
    view, done = out.data, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise DamagedCheckpoint(
                f"{path}: ends at byte {offset + done}, before byte {offset + len(view)}; {DAMAGED}"
            )
        done += count


def read_exactly(descriptor: int, path: Path, offset: int, count: int) -> bytes:
    """Return `count` bytes at `offset`. Raises CheckpointError where the file ends before."""
    out = np.empty(count, np.uint8)
    read_into(descriptor, path, offset, out)
    return out.tobytes()
