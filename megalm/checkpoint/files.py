"""The few file system calls that a checkpoint's safety rests on.

Owns: making files and directories durable (fsync), renaming, removing. The order of the calls belongs to
`writer.py` and `manager.py`. Tests pass their own `FileSystem`, which records the calls or makes them fail.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from megalm.distributed.progress import progress


class FileSystem:
    """The calls that change the disk, one method each. All raise OSError with the path."""

    def make_directory(self, path: Path) -> None:
        """Make `path`, and its parents, durably. A directory that exists is left as it is."""
        if path.is_dir():
            return
        self.make_directory(path.parent)
        path.mkdir(exist_ok=True)
        self.sync_directory(path.parent)

    def require_directory(self, path: Path) -> None:
        """Raise FileNotFoundError where the directory `path` is no longer."""
        if not path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def create(self, path: Path) -> int:
        """Return the descriptor of a new, empty file at `path`, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest) :]
            progress.act()  # a disk that is slow is told from one that hangs

    def begin_sync(self, descriptor: int, offset: int, count: int) -> None:
        """Have the disk begin with bytes that were written, as a hint: `sync` then has less to wait for."""
        with suppress(OSError):  # what the disk refuses is told by `sync`
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)  # Linux drops clean pages only

    def sync(self, descriptor: int) -> None:
        """Return when the file's bytes are on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close the descriptor. Some network file systems report a failed write only here."""
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Return when the names in the directory `path` are on the disk.

        File systems that cannot sync a directory (EINVAL, ENOTSUP) order their names by themselves.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename `source` to `target` in one step."""
        os.rename(source, target)

    def remove_tree(self, path: Path) -> None:
        """Remove the directory `path` and all in it; nothing there is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)

    def write_file(self, path: Path, data: bytes) -> None:
        """Write the new file `path` and return when its bytes (not yet its name) are on the disk."""
        descriptor = self.create(path)
        try:
            self.write(descriptor, data)
            self.sync(descriptor)
        finally:
            self.close(descriptor)
