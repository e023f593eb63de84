"""Files as the whole project treats them: what may be opened, and writing that a kill or a power failure survives."""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def require_regular(path: Path) -> None:
    """Raise OSError for a missing path, a pipe, a socket or a device; a directory is left to `open` to refuse.

    To read a pipe may wait for ever, and a device may have no end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def json_number(value: float) -> float | str:
    """Return a number as JSON has it: NaN and infinities become strings, which `float()` reads."""
    return value if math.isfinite(value) else str(float(value)).replace("inf", "Infinity").replace("nan", "NaN")


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that, whenever the process or the machine stops, `path` holds all of it or what it held.

    Only one process at a time may write `path`. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
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
    partial = path.with_name(f".{path.name}.partial")
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
