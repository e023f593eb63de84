"""Space and write speed at the run's directory. No torch."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalm.config.run import RunConfig
from megalm.config.storage import BYTES, masters_dtype, muon_parameters, optimizer_states, wide_dtype
from megalm.preflight.finding import Finding, Place, gib

WRITTEN_BYTES = 32 * 2**20
_CHUNK_BYTES = 4 * 2**20
_WRITE_LIMIT_S = 3.0
_SLOW_MB_S = 20.0
_FEW_INODES = 10_000


@dataclass(frozen=True)
class Space:
    """What a file system says of itself; `inodes` is None where it counts none."""

    free_bytes: int
    total_bytes: int
    inodes: int | None


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """Return the size of a checkpoint of so many parameters: master weights and the optimizer's state, 2% besides."""
    formats = [masters_dtype(config), *optimizer_states(config).values()]
    numbers = parameters * sum(BYTES[name] for name in formats)
    if config.optim.kind == "muon":  # AdamW has one number more of each of its parameters
        numbers += max(0, parameters - muon_parameters(config)) * BYTES[wide_dtype(config)]
    return int(1.02 * numbers)


def existing_parent(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    return next((parent for parent in (path, *path.parents) if parent.is_dir()), Path("/"))


def mount_point(directory: Path) -> Path:
    """Return where the file system of an absolute directory is mounted."""
    return next(parent for parent in (directory, *directory.parents) if parent.is_mount() or parent == parent.parent)


def space(directory: Path, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> Space:
    """Return the space that a user without privileges has in the file system of `directory`. Raises OSError."""
    said = statvfs(directory)
    return Space(said.f_bavail * said.f_frsize, said.f_blocks * said.f_frsize, said.f_favail if said.f_files else None)


def write_speed(directory: Path, size: int = WRITTEN_BYTES, limit_s: float = _WRITE_LIMIT_S) -> float:
    """Write up to `size` bytes to a file without a lasting name, with fsync, and return MB/s (10^6). Raises OSError.

    Stops between chunks once `limit_s` is over. The content is random, so that no file system compresses it away.
    """
    chunk = os.urandom(_CHUNK_BYTES)
    written, begin = 0, time.monotonic()
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".megalm-doctor-") as stream:
        while written < size and time.monotonic() - begin < limit_s:
            part = chunk[: size - written]
            stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
            written += len(part)
    return written / max(time.monotonic() - begin, 1e-9) / 1e6


def writes(directory: Path) -> None:
    """Write a page durably, read it back and remove it. Raises OSError if any of that fails."""
    page = os.urandom(4096)
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".megalm-preflight-")
    try:
        with open(descriptor, "w+b") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)
            if stream.read() != page:
                raise OSError(None, "what is read is not what was written")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def space_findings(directory: Path, found: Space, needed_bytes: int) -> list[Finding]:
    """Judge the space in the directory."""
    text = f"{gib(found.free_bytes)} of {gib(found.total_bytes)} free at {directory}"
    values = {"disk_free_bytes": found.free_bytes, "disk_mount": str(mount_point(directory))}
    if found.free_bytes < needed_bytes:
        remedy = f"df -h {directory}; free space, or choose another run.dir"
        return [Finding("disk", "fail", f"{text}; {gib(needed_bytes)} are needed", remedy, values)]
    findings = [Finding("disk", "ok", text, values=values)]
    if found.inodes is not None and found.inodes < _FEW_INODES:
        text = f"{found.inodes} more files may be made at {directory}"
        findings.append(Finding("disk", "fail" if found.inodes < 100 else "warn", text, f"df -i {directory}"))
    return findings


def speed_finding(directory: Path, mb_s: float) -> Finding:
    """Judge the speed of writing with fsync."""
    values = {"disk_mb_s": mb_s}
    text = f"{mb_s:.0f} MB/s written with fsync at {directory}"
    if mb_s < _SLOW_MB_S:
        remedy = "choose a run.dir on a faster file system, or a larger checkpoint.every"
        return Finding("disk speed", "warn", text, remedy, values)
    return Finding("disk speed", "ok", text, values=values)


def check_disk(place: Place) -> Iterator[Finding]:
    """Space, files and write speed at the run's directory, or where it will be made."""
    directory = existing_parent(place.run_dir)
    found = space(directory)
    yield from space_findings(directory, found, place.needed_bytes)
    if found.free_bytes < 4 * _CHUNK_BYTES:
        return
    try:
        yield speed_finding(directory, write_speed(directory, min(WRITTEN_BYTES, found.free_bytes // 4)))
    except OSError as error:
        remedy = f"ls -ld {directory}; choose a run.dir that can be written"
        yield Finding("disk", "fail", f"{directory} cannot be written ({error.strerror})", remedy)
