"""Reading a checkpoint into any layout: any local shard or flat range of it, from the pieces that overlap.

Owns: which files a read touches, their verification, and the errors of a damaged or foreign checkpoint.
The choice among several checkpoints belongs to `manager.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint.blocks import DAMAGED, BlockCache, FileRecord, hash_file, open_regular, read_exactly, unreadable
from megalm.checkpoint.geometry import Offsets, Piece, overlap
from megalm.checkpoint.index import tiling_problem
from megalm.checkpoint.manifest import Entry, Manifest, piece_problem
from megalm.checkpoint.names import CHECKPOINT_NAME, FILE_NAME, MANIFEST, STATE, STATE_LIMIT_BYTES
from megalm.checkpoint.tensor_file import CHUNK_BYTES, DTYPES, Read, TensorFile
from megalm.distributed.progress import progress
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError, DamagedCheckpoint

READ_THREADS = 4
OPEN_FILES = 64  # at once
RECIPE = "use the recipe that wrote it (config.yaml of its run)"


class CheckpointReader:
    """One checkpoint's directory, open for reading. Every method may raise CheckpointError.

    `step`, `state` (what was saved with it) and `layout` (what wrote it) are checked on opening, always. With
    `verify` every byte that a read returns, and every header that it follows, is checked: by the digests of the blocks
    in which it lies. Of format version 1, which has none, the whole file is, when a read first touches it.
    """

    def __init__(self, directory: Path, verify: bool = True) -> None:
        """Read and check the manifest and the state; a tensor file is looked at when it is first read."""
        self.directory = directory
        self.manifest = Manifest.load(directory)
        self.step = self.manifest.step
        self.layout: Mapping[str, Any] = self.manifest.layout
        self._verify = verify
        self._opened: dict[str, TensorFile] = {}
        self._cache = BlockCache()
        self._checks: dict[str, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._index: dict[tuple[str, str], tuple[list[Entry], Offsets, Offsets]] = {}
        self.state: dict[str, Any] = self._read_state()
        named = CHECKPOINT_NAME.fullmatch(directory.name)
        if named and int(named[1]) != self.step:
            raise DamagedCheckpoint(f"{directory}: holds step {self.step}, not the step of its name; rename it")

    def kinds(self) -> list[str]:
        """Return the kinds of tensors that are there, sorted."""
        return sorted({kind for kind, _ in self.manifest.tensors})

    def names(self, kind: str) -> list[str]:
        """Return the logical names of the tensors of one kind, sorted."""
        return sorted(name for found, name in self.manifest.tensors if found == kind)

    def files(self, *kinds: str) -> list[str]:
        """Return the names of the files in which tensors of these kinds may lie, sorted: some parts of all ranks."""
        rows = (row for (found, _), some in self.manifest.tensors.items() if found in kinds for row in some)
        parts = {match[2] for row in rows if (match := FILE_NAME.fullmatch(str(row["file"])))}
        names = ((name, FILE_NAME.fullmatch(name)) for name in self.manifest.files)
        return sorted(name for name, match in names if match and match[2] in parts)

    def read_local(self, shard: ShardSpec, kind: str) -> Tensor:
        """Return the local tensor of `shard`, a CPU tensor of the stored dtype; padding is zero."""
        return self.read_flat(shard, kind, 0, prod(shard.local_shape)).reshape(shard.local_shape)

    def read_flat(self, shard: ShardSpec, kind: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of `shard`'s row-major flattened local tensor; padding is zero.

        `out`, where it is given, is filled and returned, 1-D of that many elements: straight from the file if it is on
        the CPU, contiguous and of the stored dtype, else by a copy. What it holds after an error is undefined.
        """
        entries, low, high = self._entries(shard, kind)
        problem = piece_problem(shard, start, stop)
        if problem:
            raise CheckpointError(f"read of {shard.name} ({kind}): {problem}; correct the caller")
        target = Piece(shard, start, stop)
        wanted = target.count()
        dtype = DTYPES[entries[0].dtype]
        if out is not None:
            if out.shape != (stop - start,):
                problem = f"{stop - start} elements for out {tuple(out.shape)}"
                raise CheckpointError(f"read of {shard.name} ({kind}): {problem}; correct the caller")
            if out.dtype != dtype or not out.is_contiguous() or out.device.type != "cpu":
                return out.copy_(self.read_flat(shard, kind, start, stop))
        else:
            out = _new(stop - start, dtype)
        if wanted < stop - start:
            out.zero_()
        begin, end = target.bounds()
        near = np.flatnonzero((low < end) & (high > begin)) if wanted else ()
        chosen = (entry for i in near for entry in entries[i].pieces(begin, end))
        found = 0
        while some_entries := list(islice(chosen, OPEN_FILES)):
            copies = [(entry, list(overlap(entry.piece, target))) for entry in some_entries]
            plans = (self._file(entry).plan(entry.key, some, out.detach()) for entry, some in copies if some)
            self._run([read for plan in plans for read in plan])
            found += sum(copy.length * copy.repeat for _, some in copies for copy in some)
        if found != wanted:
            problem = f"{found} of {wanted} elements listed"
            raise DamagedCheckpoint(f"{self.directory}: {shard.name} ({kind}): {problem}; {DAMAGED}")
        return out

    def check_sizes(self, names: Iterable[str] | None = None) -> None:
        """Check that the named files (None: all) are there, with their sizes: a call of the file system each."""
        for name in self.manifest.files if names is None else names:
            self._check_size(name, self._record(name).size)

    def verify_files(self, names: Iterable[str] | None = None) -> None:
        """Check every byte of the named files (None: of all). What was checked is not checked again."""
        names = list(self.manifest.files if names is None else names)
        self.check_sizes(names)
        _all_done([self._check(name) for name in names])

    def close(self) -> None:
        """End the threads; the reader may still be used, and starts them again."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _entries(self, shard: ShardSpec, kind: str) -> tuple[list[Entry], Offsets, Offsets]:
        """Return the pieces and runs of a tensor and their global bounds; a tensor of another shape is an error."""
        key = (kind, shard.name)
        if key not in self._index:
            if key not in self.manifest.tensors:
                raise CheckpointError(self._missing(shard.name, kind))
            try:
                entries = self.manifest.entries(kind, shard.name)
                if problem := tiling_problem(entries):
                    raise ValueError(problem)
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedCheckpoint(
                    f"{self.directory / MANIFEST}: index of {shard.name} ({kind}): {error}; {DAMAGED}"
                ) from error
            bounds = np.array([entry.piece.bounds() for entry in entries], np.int64)
            self._index[key] = (entries, bounds[:, 0], bounds[:, 1])
        stored = self._index[key][0][0].piece.shard.global_shape
        if stored != tuple(shard.global_shape):
            raise CheckpointError(
                f"{self.directory}: tensor {shard.name} ({kind}) has shape {stored} in the checkpoint and "
                f"{tuple(shard.global_shape)} in this model; {RECIPE}"
            )
        return self._index[key]

    def _missing(self, name: str, kind: str) -> str:
        kinds = [found for found, known in self.manifest.tensors if known == name]
        if kinds:
            known = f"it has {', '.join(sorted(kinds))} of it"
        else:
            known = f"it has {len(self.names(kind))} tensors of that kind (kinds: {', '.join(self.kinds())})"
        return f"{self.directory}: no tensor {name} ({kind}) in the checkpoint; {known}; {RECIPE}"

    def _file(self, entry: Entry) -> TensorFile:
        """Return the file of a piece, whose header is checked."""
        name = entry.file
        if name not in self._opened:
            record = self._record(name)
            if self._verify and record.blocks is None:
                self._check(name).result()
            record = record if self._verify else replace(record, blocks=None)
            self._opened[name] = TensorFile(self.directory / name, record, self._cache)
        return self._opened[name]

    def _run(self, reads: list[Read]) -> None:
        """Read some megabytes here, and more in several threads: while one waits for the disk, others hash."""
        with ExitStack() as stack:
            descriptors: dict[Path, int] = {}
            for file in {read.file.path: read.file for read in reads}.values():
                try:
                    descriptors[file.path] = stack.enter_context(open_regular(file.path)).fileno()
                    own = [read for read in reads if read.file is file]
                    file.expect(descriptors[file.path], own[0].copy.source, own[-1].copy.source + own[-1].span)
                except OSError as error:
                    raise unreadable(file.path, error) from error
            if len(tasks := _tasks(reads)) == 1:
                _read(tasks[0], descriptors)
                progress.act()
            else:
                _all_done([self._threads().submit(_read, task, descriptors) for task in tasks])

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(READ_THREADS, 2 * (os.cpu_count() or 1)), "checkpoint-read")
        return self._pool

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise DamagedCheckpoint(f"{self.directory}: the manifest names {name} but has no checksum; {DAMAGED}")
        return self.manifest.files[name]

    def _check(self, name: str) -> Future[None]:
        if name not in self._checks:
            self._checks[name] = self._threads().submit(hash_file, self.directory / name, self._record(name))
        return self._checks[name]

    def _check_size(self, name: str, expected: int) -> None:
        path = self.directory / name
        try:
            size = path.lstat().st_size
        except OSError as error:
            raise unreadable(path, error) from error
        if size != expected:
            raise DamagedCheckpoint(f"{path}: {size} bytes where the manifest has {expected}; {DAMAGED}")

    def _read_state(self) -> dict[str, Any]:
        path = self.directory / STATE
        record = self.manifest.files.get(STATE)
        if record is None:
            raise DamagedCheckpoint(f"{self.directory}: the manifest does not name {STATE}; {DAMAGED}")
        self._check_size(STATE, record.size)
        if record.size > STATE_LIMIT_BYTES:
            raise DamagedCheckpoint(f"{path}: {record.size} bytes, more than a state has; {DAMAGED}")
        try:
            with open_regular(path) as file:
                data = read_exactly(file.fileno(), path, 0, record.size)
            if hashlib.sha256(data).hexdigest() != record.sha256:
                raise DamagedCheckpoint(f"{path}: its SHA-256 is not the manifest's; {DAMAGED}")
            state = json.loads(data)
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpoint(f"{path}: not JSON ({error}); {DAMAGED}") from error
        if not isinstance(state, dict):
            raise DamagedCheckpoint(f"{path}: holds a {type(state).__name__}, not an object; {DAMAGED}")
        return state


def _all_done(running: list[Future[None]]) -> None:
    """Wait for all, and raise the first one's error."""
    for _ in as_completed(running):
        progress.act()  # a disk that is slow is told from one that hangs
    for one in running:
        one.result()


def _new(count: int, dtype: torch.dtype) -> Tensor:
    """Return a 1-D tensor whose elements are anything: numpy takes large ones in huge pages, torch in small ones."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype)


def _tasks(reads: list[Read]) -> list[list[Read]]:
    """Put reads together that are too small for a thread's trouble."""
    tasks: list[list[Read]] = [[]]
    size = 0
    for read in reads:
        if tasks[-1] and size + read.span > CHUNK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(read)
        size += read.span
    return tasks


def _read(task: list[Read], descriptors: Mapping[Path, int]) -> None:
    for read in task:
        try:
            read.run(descriptors[read.file.path])
        except OSError as error:
            raise unreadable(read.file.path, error) from error
