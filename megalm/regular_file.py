"""Refuses what is no plain file before it is opened: to read a pipe may wait for ever, a device may have no end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def require_regular(path: Path) -> None:
    """Raise OSError for a missing path, a pipe, a socket or a device; a directory is left to `open` to refuse."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
