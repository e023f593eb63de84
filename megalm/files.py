"""Files as the whole project treats them: what may be opened, and writing that a kill or a power failure survives."""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from megalm.errors import StorageError

logger = logging.getLogger(__name__)


def require_regular(path: Path) -> None:
    """Raise OSError for a missing path, a pipe, a socket or a device; a directory is left to `open` to refuse.

    To read a pipe may wait for ever, and a device may have no end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def refused_write(error: OSError, path: Path) -> StorageError:
    """Return the one-line error for a disk that refused a write of `path`, or below it."""
    where = Path(error.filename or path)
    where = where if where.is_absolute() or where == path or path in where.parents else path / where
    words = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(f"{where}: cannot be written: {words}; {storage_remedy(error)}")


def storage_remedy(error: OSError) -> str:
    """Return what to do about a disk that refused a write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space there, lower checkpoint.keep, or set run.dir to another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable, or set run.dir to another place"
    return "check the file system"


def json_number(value: float) -> float | str:
    """Return a number as JSON has it: NaN and infinities become strings, which `float()` reads."""
    return value if math.isfinite(value) else str(float(value)).replace("inf", "Infinity").replace("nan", "NaN")


def partial_of(path: Path) -> Path:
    """Return where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.partial")


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that, whenever the process or the machine stops, `path` holds all of it or what it held.

    Only one process at a time may write `path`. Raises OSError.
    """
    partial = partial_of(path)
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_table(path: Path, lines: Sequence[str]) -> None:
    """Replace a table that people look at: whole or not at all, but without a sync, which could slow this rank down.

    A disk that refuses is no reason to end a run, so it is only said.
    """
    partial = partial_of(path)
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable, such as that of a file just renamed into it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
