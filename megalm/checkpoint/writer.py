"""Writing a checkpoint: every rank its own pieces, then rank 0 the manifest, then one rename.

Owns: the order of writes, fsyncs and renames. A kill at any moment leaves either the checkpoints that were
there before or these and the new one, whole; at worst a hidden `.step-*` directory stays, which `manager.py`
clears.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.checkpoint.blocks import HASH_THREADS, FileRecord
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.geometry import Piece
from megalm.checkpoint.index import Rows, collect, told
from megalm.checkpoint.manifest import FORMAT, KIND, VERSION, Entry, Manifest, piece_problem
from megalm.checkpoint.names import MANIFEST, STATE, checkpoint_name, file_name, hidden
from megalm.checkpoint.tensor_file import DTYPE_NAMES, write_tensor_file
from megalm.distributed.exchange import Group, gather_distinct, gather_json, rank_of, together
from megalm.distributed.meeting import Meeting
from megalm.distributed.progress import progress
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError, StorageError
from megalm.files import json_number, storage_remedy

logger = logging.getLogger(__name__)

FILE_BYTES = 1 << 30  # a rank begins another file before one grows beyond this
FILE_TENSORS = 100_000  # and beyond this number of pieces, which keeps headers small


def write_checkpoint(
    directory: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: Mapping[str, Any],
    group: Group = None,
    layout: Mapping[str, Any] | None = None,
    files: FileSystem | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write `directory/step-XXXXXXXX` and return its path; the checkpoint is durable on return.

    Every rank of `group` (None: this process alone) must call, each with the fragments that it owns: over all
    ranks they must tile each tensor of each kind exactly once, trailing padding left out or not. Fragments
    are consumed one by one and held until their file is full (`file_bytes`). `state` (JSON values, rank 0's
    counts) and `layout` (what wrote it, for people) are stored as they are. A checkpoint of the same step is
    replaced in one rename. Raises CheckpointError on all ranks if any rank fails, a StorageError where a disk refused,
    and leaves the earlier checkpoints as they were.
    """
    path, _ = write_and_count(directory, step, fragments, state, group, layout, files, file_bytes)
    return path


def write_and_count(
    directory: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: Mapping[str, Any],
    group: Group | Meeting = None,
    layout: Mapping[str, Any] | None = None,
    files: FileSystem | None = None,
    file_bytes: int = FILE_BYTES,
) -> tuple[Path, int]:
    """Do what `write_checkpoint` does and return the bytes of tensor files besides: of all ranks on rank 0, else 0.

    A thread beside the main one gives a `Meeting` as `group`.
    """
    files = files or FileSystem()
    final = directory / checkpoint_name(step)
    partial = hidden(final, "partial")
    try:
        with together(group):
            if rank_of(group) == 0:
                state_text = encode_state(state)
                with _NamedErrors(partial):
                    files.make_directory(directory)
                    files.remove_tree(partial)
                    files.make_directory(partial)
        writer = RankWriter(files, partial, rank_of(group), step, file_bytes)
        with together(group):
            writer.write(fragments)
        report, rows = writer.report()
        reports, lists = gather_json(report, group), gather_distinct(rows, group)
        total = sum(size for report in reports for _, size, *_ in report["files"])
        with together(group):
            if rank_of(group) == 0:
                finish(files, final, step, state_text, dict(layout or {}), reports, lists)
    except BaseException:
        if rank_of(group) == 0:
            _discard(files, final)
        raise
    return final, total


class RankWriter:
    """The files of one rank: weights apart from the rest, so that reading a model leaves the rest alone."""

    def __init__(self, files: FileSystem, partial: Path, rank: int, step: int, file_bytes: int = FILE_BYTES) -> None:
        """Write nothing yet. `partial` is the directory that rank 0 has made."""
        self._files, self._partial, self._rank, self._step = files, partial, rank, step
        self._file_bytes = file_bytes
        self._pending: dict[str, dict[str, tuple[Entry, Tensor]]] = {"weight": {}, "optimizer": {}}
        self._bytes = dict.fromkeys(self._pending, 0)
        self._serial = dict.fromkeys(self._pending, 0)
        self._records: list[FileRecord] = []
        self._rows: list[dict[str, Any]] = []

    def write(self, fragments: Iterable[Fragment]) -> None:
        """Write all fragments. Raises CheckpointError with the path."""
        with ThreadPoolExecutor(HASH_THREADS, "checkpoint-hash") as hashers:
            for fragment in fragments:
                progress.act()
                self._add(fragment, hashers)
            for part in self._pending:
                progress.act()
                self._flush(part, hashers)

    def report(self) -> tuple[dict[str, Any], dict[str, Rows]]:
        """Return what rank 0 needs for the manifest, as JSON values: of this rank alone, and see `index.told`."""
        report, lists = told(self._rank, self._rows)
        return {**report, "files": [record.to_json() for record in self._records]}, lists

    def _add(self, fragment: Fragment, hashers: ThreadPoolExecutor) -> None:
        shard, values = fragment.shard, fragment.values
        stop = fragment.start + values.numel()
        problem = piece_problem(shard, fragment.start, stop)
        if values.dim() != 1 or values.dtype not in DTYPE_NAMES or not KIND.fullmatch(fragment.kind):
            what = f"shape {tuple(values.shape)}, {values.dtype}"
            problem = f"{what} is not a 1-D tensor that safetensors store, or the kind has odd characters"
        if problem:
            raise CheckpointError(f"fragment of {shard.name} ({fragment.kind}): {problem}; correct the caller")
        piece = Piece(shard, fragment.start, min(stop, Piece(shard, fragment.start, stop).valid_stop))
        if piece.stop <= piece.start and 0 not in shard.global_shape:
            return
        part = "weight" if fragment.kind == "weight" else "optimizer"
        size = values.numel() * values.element_size()
        full = self._bytes[part] + size > self._file_bytes or len(self._pending[part]) >= FILE_TENSORS
        if self._pending[part] and full:
            self._flush(part, hashers)
        entry = Entry(fragment.kind, DTYPE_NAMES[values.dtype], self._name(part), piece)
        if entry.key in self._pending[part]:
            raise CheckpointError(f"fragment {entry.key} was given twice by one rank; correct the caller")
        self._pending[part][entry.key] = (entry, values[: piece.stop - piece.start])
        self._bytes[part] += size

    def _name(self, part: str) -> str:
        serial = f"-{self._serial[part]}" if self._serial[part] else ""
        return file_name(self._rank, part + serial)

    def _flush(self, part: str, hashers: ThreadPoolExecutor) -> None:
        pending = self._pending[part]
        if not pending:
            return
        path = self._partial / self._name(part)
        rows = {key: entry.to_json() for key, (entry, _) in pending.items()}
        tensors = [(key, values) for key, (_, values) in pending.items()]
        about = {"format": "pt", FORMAT: str(VERSION), "step": str(self._step), "index": json.dumps(rows)}
        with _NamedErrors(path):
            self._records.append(write_tensor_file(self._files, path, tensors, about, hashers))
        self._rows.extend(rows.values())
        self._pending[part], self._bytes[part] = {}, 0
        self._serial[part] += 1


def finish(
    files: FileSystem,
    final: Path,
    step: int,
    state_text: bytes,
    layout: dict[str, Any],
    reports: list[Any],
    lists: Mapping[str, Rows],
) -> None:
    """Complete the partial directory of `final` from all ranks' reports and lists of rows, and rename it (rank 0)."""
    partial = hidden(final, "partial")
    written = [FileRecord.from_json(row) for report in reports for row in report["files"]]
    records = {record.name: record for record in written}
    for record in written:
        path = partial / record.name
        with _NamedErrors(path):
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                files.require_directory(partial)
        if found != record.size:
            where = "is not there" if found is None else f"has {found} of {record.size} bytes"
            raise CheckpointError(f"{path}: {where} for rank 0; run.dir must be on a file system that all ranks share")
    records[STATE] = FileRecord(STATE, len(state_text), sha256(state_text).hexdigest())
    tensors = collect(reports, lists)
    manifest = Manifest(step, layout, records, tensors).encode()
    with _NamedErrors(partial):
        files.write_file(partial / STATE, state_text)
        files.write_file(partial / MANIFEST, manifest)
        files.sync_directory(partial)
        replaced = hidden(final, "replaced")
        replaces = final.exists()
        if replaces:
            files.remove_tree(replaced)
            files.rename(final, replaced)
        files.rename(partial, final)
        files.sync_directory(final.parent)
        if replaces:
            files.remove_tree(replaced)


def _discard(files: FileSystem, final: Path) -> None:
    """Undo a failed save as far as the disk allows: what stays is hidden and cleared by the next run."""
    try:
        restore(files, final)
        files.remove_tree(hidden(final, "partial"))
    except OSError as error:
        logger.warning("%s: cannot clear a failed save (%s); the next run will", final, error.strerror)


def restore(files: FileSystem, final: Path) -> None:
    """Put a checkpoint back that was set aside for a new one which never came. Raises OSError."""
    replaced = hidden(final, "replaced")
    if replaced.exists() and not final.exists():
        files.rename(replaced, final)
        files.sync_directory(final.parent)


class _NamedErrors:
    """Turn an OSError of the block into a CheckpointError with the path, the system's words and a remedy."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(error, self._path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the one-line error for a disk that refused a write below `path`."""
    words = os.strerror(error.errno) if error.errno else str(error)
    where = error.filename or path
    return StorageError(f"{where}: cannot save the checkpoint: {words}; earlier ones are kept; {storage_remedy(error)}")


def encode_state(state: Mapping[str, Any]) -> bytes:
    """Return the text of `state.json`: NaN and infinities become strings, which `float()` reads.

    Raises CheckpointError for values that JSON does not keep.
    """
    return (json.dumps(_as_json(state, "state"), indent=1, allow_nan=False) + "\n").encode()


def _as_json(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: key {key!r} is not a string and would come back as one; use a string")
        return {key: _as_json(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if type(value) is float:
        return json_number(value)
    if type(value) not in (str, int, bool, type(None)):
        raise CheckpointError(f"{path}: {type(value).__name__} is no JSON value; store tensors as fragments")
    return value
