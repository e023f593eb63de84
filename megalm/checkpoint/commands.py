"""What `megalm checkpoint inspect`, `verify` and `diff` answer; the command line prints it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from megalm.checkpoint.difference import difference
from megalm.checkpoint.names import CHECKPOINT_NAME, CHECKPOINTS, MANIFEST, find_checkpoints
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.tensor_file import DTYPES
from megalm.errors import CheckpointError, DamagedCheckpoint

Answer = TypeVar("Answer")
DELETED = "deleted meanwhile by the run"


def inspect(path: Path) -> dict[str, Any]:
    """Return what the newest checkpoint at `path` holds; tensor files are there in their sizes, but not read.

    `path` is a run's directory or one checkpoint's. Keys: path, step, layout, tensors, parameters, dtype (of
    the weights), bytes (by kind), files ([{name, bytes}]), total_bytes, state. Raises CheckpointError.
    """
    return of_newest(path, _inspect)


def _inspect(reader: CheckpointReader) -> dict[str, Any]:
    reader.check_sizes()
    sizes: Counter[str] = Counter()
    parameters, dtypes = 0, set()
    for (kind, _), rows in reader.manifest.tensors.items():
        count = prod(rows[0]["shape"])
        sizes[kind] += count * DTYPES[rows[0]["dtype"]].itemsize
        if kind == "weight":
            parameters += count
            dtypes.add(rows[0]["dtype"])
    records = reader.manifest.files.values()
    return {
        "path": str(reader.directory),
        "step": reader.step,
        "layout": dict(reader.layout),
        "tensors": len(reader.names("weight")),
        "parameters": parameters,
        "dtype": ", ".join(sorted(dtypes)),
        "bytes": dict(sorted(sizes.items())),
        "files": [{"name": record.name, "bytes": record.size} for record in records],
        "total_bytes": sum(record.size for record in records),
        "state": reader.state,
    }


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of the checkpoints at `path`, a run's directory (all of them) or one checkpoint's.

    Keys: checkpoints ([{path, step, files, bytes}]), seconds, and where there are any, deleted_meanwhile: the paths of
    those that a run which goes on has deleted before they were read to their end, which is no damage. Raises
    CheckpointError if any is damaged, with the first reason, after all have been checked, and where none could be.
    """
    begin = time.monotonic()
    checked: list[dict[str, Any]] = []
    deleted: list[str] = []
    errors: list[str] = []
    for directory in checkpoints_at(path):
        try:
            with closing(CheckpointReader(directory)) as reader:
                reader.verify_files()
        except CheckpointError as error:
            if _is_gone(directory):
                deleted.append(str(directory))
            else:
                errors.append(str(error))
            continue
        total = sum(record.size for record in reader.manifest.files.values())
        files = len(reader.manifest.files)
        checked.append({"path": str(directory), "step": reader.step, "files": files, "bytes": total})
    if errors:
        others = {"more damaged": len(errors) - 1, "good": len(checked), DELETED: len(deleted)}
        more = ", ".join(f"{count} {text}" for text, count in others.items() if count)
        raise CheckpointError(errors[0] + (f" (and {more})" if more else ""))
    if not checked:
        raise CheckpointError(f"{path}: {len(deleted)} {DELETED}, and no other was there; try again")
    gone = {"deleted_meanwhile": deleted} if deleted else {}
    return {"checkpoints": checked, **gone, "seconds": time.monotonic() - begin}


def diff(first: Path, second: Path) -> dict[str, Any]:
    """Return what differs between two checkpoints, each a run's newest or one; see `difference`."""
    return of_newest(first, lambda one: of_newest(second, lambda other: difference(one, other)))


def of_newest(path: Path, use: Callable[[CheckpointReader], Answer]) -> Answer:
    """Return what `use` makes of the newest checkpoint at `path`, a run's directory or one checkpoint's.

    Where the run goes on and has deleted it meanwhile, `use` is called again with the one that is the newest then.
    Raises CheckpointError.
    """
    while True:
        directory = checkpoints_at(path)[0]
        try:
            with closing(CheckpointReader(directory)) as reader:
                return use(reader)
        except DamagedCheckpoint:
            if not _is_gone(directory):
                raise


def _is_gone(directory: Path) -> bool:
    try:
        directory.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoints of a run's directory, newest first, or the one that `path` is. Raises CheckpointError."""
    if (path / MANIFEST).exists() or CHECKPOINT_NAME.fullmatch(path.resolve().name):
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such checkpoint; give a run's directory or one of its {CHECKPOINTS}/step-*"
            )
        return [path]
    found = find_checkpoints(path / CHECKPOINTS) or find_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint; give a run's directory or one of its {CHECKPOINTS}/step-*")
    return found
