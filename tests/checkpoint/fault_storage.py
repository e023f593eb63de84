"""Saves on a disk that fails: refused calls, lost directories, full and read-only file systems, random I/O errors.

    python -m tests.checkpoint.fault_storage

injects every fault below into a save that replaces, or follows, an earlier checkpoint. Afterwards a checkpoint loads, a
save that returned is there, an error names path and cause on one line, and the next save, of the same process and of a
new one, works. Ends with 1, and the fault, where that is not so. libfiu (Debian's fiu-utils) and `unshare` serve the
faults of the system; what is missing is skipped, and said.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.commands import verify
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.manager import CheckpointManager, latest_checkpoint
from megalm.checkpoint.names import CHECKPOINTS
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError
from tests.checkpoint.subject import listening

SPEC = ShardSpec.whole("x.weight", (4, 8))
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE)
CALLS = [name for name, value in vars(FileSystem).items() if callable(value) and not name.startswith("_")]
PRELOAD = Path("/usr/lib/fiu/fiu_posix_preload.so")
MOUNT = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"', "sh")
PROBABILITIES = (0.02, 0.05, 0.1, 0.3)

Fault = Callable[["FaultyFileSystem", str, tuple[Any, ...]], None]


class FaultyFileSystem(FileSystem):
    """Tells `fault` of each call before it is made; nothing is really synced."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.made = fault, 0

    def sync(self, descriptor: int) -> None:
        """Return at once."""

    def sync_directory(self, path: Path) -> None:
        """Return at once, but not for a directory that is gone."""
        path.stat()


def _told(name: str) -> Callable[..., Any]:
    real = getattr(FaultyFileSystem, name)

    def call(self: FaultyFileSystem, *args: Any) -> Any:
        self.made += 1
        self.fault(self, name, args)
        return real(self, *args)

    return call


for _name in CALLS:
    setattr(FaultyFileSystem, _name, _told(_name))


def nothing(files: FaultyFileSystem, name: str, args: tuple[Any, ...]) -> None:
    """Let the call be made."""


def refuse(files: FaultyFileSystem, name: str, args: tuple[Any, ...], at: int, code: int) -> None:
    """Refuse the call number `at`, of whatever kind it is."""
    if files.made == at:
        raise OSError(code, os.strerror(code), *[str(arg) for arg in args[:1] if isinstance(arg, Path)])


def refuse_from(files: FaultyFileSystem, name: str, args: tuple[Any, ...], at: int, code: int) -> None:
    """Refuse all calls from number `at` on, as a disk that is gone for good does."""
    refuse(files, name, args, max(at, files.made), code)


def vanish(files: FaultyFileSystem, name: str, args: tuple[Any, ...], at: int, run: Path) -> None:
    """Rename the directory of the checkpoints away before call number `at`."""
    if files.made == at:
        (run / CHECKPOINTS).rename(run / "gone")


def slow(files: FaultyFileSystem, name: str, args: tuple[Any, ...]) -> None:
    """Let the call take a while."""
    time.sleep(0.005)


def save(manager: CheckpointManager, step: int, mark: float, size: int = 32) -> Path:
    """Save weights and a moment that are all `mark`."""
    spec = SPEC if size == 32 else ShardSpec.whole(SPEC.name, (size,))
    values = torch.full((size,), mark)
    fragments = [Fragment(spec, kind, 0, values) for kind in ("weight", "exp_avg")]
    return manager.save(step, fragments, {"mark": mark})


def mark_of(run: Path) -> float | None:
    """Return which save the newest valid checkpoint is of; all of it must be."""
    reader = latest_checkpoint(run)
    if reader is None:
        return None
    with closing(reader):
        mark = float(reader.state["mark"])
        shape = reader.manifest.entries("weight", SPEC.name)[0].piece.shard.global_shape
        for kind in ("weight", "exp_avg"):
            assert reader.read_local(ShardSpec.whole(SPEC.name, shape), kind).eq(mark).all(), (kind, mark)
    return mark


@dataclass
class Result:
    """Faults, errors and returned saves by kind, and what went wrong."""

    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    saved: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def attempt(
    result: Result,
    kind: str,
    what: str,
    run: Path,
    manager: CheckpointManager,
    step: int,
    size: int = 32,
    words: str = "",
    heal: Callable[[], None] = lambda: None,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Save mark 2 between `begin` and `heal`, where mark 1 is there already, and hold what follows to the promises."""
    result.faults[kind] += 1
    error, wrong = "", []
    with listening():
        begin()
        try:
            save(manager, step, 2.0, size)
        except CheckpointError as caught:
            error = str(caught)
        except Exception as caught:
            error = str(caught)
            wrong.append(f"{type(caught).__name__} instead of a CheckpointError: {error}")
        finally:
            heal()
        result.errors[kind] += bool(error)
        result.saved[kind] += not error
        if error and ("\n" in error or str(run) not in error or words not in error):
            wrong.append(f"the error does not say where and why: {error}")
        try:
            found = mark_of(run)
            if found != 2.0 and not (error and found == 1.0):
                wrong.append(f"the newest checkpoint is that of save {found} after {error or 'a save that returned'}")
            save(manager, 8, 3.0)
            if mark_of(run) != 3.0:
                wrong.append("the next save is not there")
            save(CheckpointManager(run, 1), 9, 4.0)
            verify(run)
            left = sorted(path.name for path in (run / CHECKPOINTS).iterdir())
            if mark_of(run) != 4.0 or left != ["step-00000009"]:
                wrong.append(f"a new start finds save {mark_of(run)} and {left}")
        except Exception as caught:
            wrong.append(f"afterwards {type(caught).__name__}: {caught}")
    result.wrong += [f"{kind}, {what}: {line}" for line in wrong]


def _fresh(directory: Path) -> Path:
    """Return a run with the checkpoint of step 6, mark 1."""
    run = directory / "run"
    shutil.rmtree(run, ignore_errors=True)
    save(CheckpointManager(run, 1, files=FaultyFileSystem(nothing)), 6, 1.0)
    return run


def count_calls(directory: Path, step: int) -> int:
    """Return how many calls a save of that step makes."""
    files = FaultyFileSystem(nothing)
    manager = CheckpointManager(_fresh(directory), 1, files=files)
    files.made = 0
    save(manager, step, 2.0)
    return files.made


def of_calls(directory: Path, result: Result, steps: tuple[int, ...] = (7, 6), codes: tuple[int, ...] = CODES) -> None:
    """Every call refused once and from then on, with every code; the directory lost before every call; a slow disk."""
    for step in steps:
        calls = count_calls(directory, step)
        for at in range(1, calls + 1):
            for code in codes:
                for kind, act in (("one call refused", refuse), ("all calls refused from one on", refuse_from)):
                    if act is refuse_from and code not in (errno.EIO, errno.ENOSPC):
                        continue
                    run = _fresh(directory)
                    files = FaultyFileSystem(nothing)
                    manager = CheckpointManager(run, 1, files=files)
                    what = f"step {step}, call {at} of {calls}, {errno.errorcode[code]}"
                    files.fault, files.made = partial(act, at=at, code=code), 0
                    heal = partial(setattr, files, "fault", nothing)
                    attempt(result, kind, what, run, manager, step, words=os.strerror(code), heal=heal)
            run = _fresh(directory)
            files = FaultyFileSystem(nothing)
            manager = CheckpointManager(run, 1, files=files)
            files.fault, files.made = partial(vanish, at=at, run=run), 0
            what, heal = f"step {step}, call {at} of {calls}", partial(_find_again, run, files)
            attempt(result, "directory vanished", what, run, manager, step, heal=heal)
        run = _fresh(directory)
        manager = CheckpointManager(run, 1, files=FaultyFileSystem(slow))
        attempt(result, "slow disk", f"step {step}", run, manager, step)


def _find_again(run: Path, files: FaultyFileSystem) -> None:
    """Put a directory back that was renamed away, unless the save has made a new one and is whole there."""
    files.fault = nothing
    gone, now = run / "gone", run / CHECKPOINTS
    if gone.exists():
        if now.exists() and mark_of(run) is None:
            shutil.rmtree(now)
        if not now.exists():
            gone.rename(now)


def _of_the_system(directory: Path, result: Result) -> None:
    """In a tmpfs of 1 MB at `directory`: filled to every degree, read-only, and libfiu's errors at random."""
    for free_kib in range(0, 300, 12):
        run = _fresh(directory)
        manager = CheckpointManager(run, 1)
        begin, heal = partial(_fill, directory, free_kib << 10), (directory / "filler").unlink
        words = os.strerror(errno.ENOSPC)
        attempt(result, "full disk", f"{free_kib} KiB free", run, manager, 7, 1 << 15, words, heal, begin)
    for step in (7, 6):
        run = _fresh(directory)
        manager = CheckpointManager(run, 1)
        mount = partial(subprocess.run, check=True)
        begin = partial(mount, ["mount", "-o", "remount,ro", str(directory)])
        heal = partial(mount, ["mount", "-o", "remount,rw", str(directory)])
        words = os.strerror(errno.EROFS)
        attempt(result, "read-only disk", f"step {step}", run, manager, step, words=words, heal=heal, begin=begin)
    if "fiu" not in os.environ.get("LD_PRELOAD", ""):
        return
    fiu = ctypes.CDLL("libfiu.so.0")
    fiu.fiu_enable_random.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_float]
    for seed in range(30):
        for probability in PROBABILITIES:
            run = _fresh(directory)
            manager = CheckpointManager(run, 1)
            fiu.fiu_set_prng_seed(seed)
            begin = partial(fiu.fiu_enable_random, b"posix/io/*", 1, None, 0, probability)
            heal = partial(fiu.fiu_disable, b"posix/io/*")
            what = f"probability {probability}, seed {seed}"
            attempt(result, "libfiu", what, run, manager, (7, 6)[seed % 2], 1 << 12, "", heal, begin)


def _fill(directory: Path, free: int) -> None:
    """Write a file that leaves so many bytes free."""
    disk = os.statvfs(directory)
    (directory / "filler").write_bytes(bytes(max(0, disk.f_bavail * disk.f_bsize - free)))


def in_a_small_tmpfs(directory: Path, result: Result) -> None:
    """Run `_of_the_system` in a process of its own, with a mount and a preloaded library of its own."""
    for problem in _why_not(directory):
        result.skipped.append(problem)
        if "fiu" not in problem:
            return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    preload = [f"LD_PRELOAD={PRELOAD}"] if PRELOAD.exists() else []
    command = [*MOUNT, str(directory), "env", *preload, sys.executable, "-m", __spec__.name, "--within", str(directory)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    for name, values in json.loads(ended.stdout.splitlines()[-1]).items():
        getattr(result, name).update(values) if isinstance(values, dict) else getattr(result, name).extend(values)


def _why_not(directory: Path) -> Iterator[str]:
    """Yield what this machine lacks."""
    if not PRELOAD.exists():
        yield f"libfiu: no {PRELOAD}; apt-get install fiu-utils"
    if shutil.which("unshare") is None:
        yield "small tmpfs: no unshare command"
        return
    probe = subprocess.run([*MOUNT, str(directory), "true"], capture_output=True, text=True)
    if probe.returncode:
        yield f"small tmpfs: none of one's own here ({probe.stderr.strip()})"


def table(result: Result) -> str:
    """Return a line a kind of fault."""
    lines = [f"{'fault':<30} injected  errors  saves that returned"]
    for kind, count in result.faults.items():
        lines.append(f"{kind:<30} {count:8}  {result.errors[kind]:6}  {result.saved[kind]:19}")
    return "\n".join([*lines, *(f"skipped: {why}" for why in result.skipped)])


def run(directory: Path) -> Result:
    """Inject every fault that this machine can."""
    result = Result()
    for name in ("calls", "tmpfs"):
        (directory / name).mkdir()
    of_calls(directory / "calls", result)
    in_a_small_tmpfs(directory / "tmpfs", result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Inject, print the table; 0 if every promise held."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint.fault_storage")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.within:
        result = Result()
        _of_the_system(parsed.within, result)
        print(json.dumps(vars(result)))
        return 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        result = run(Path(directory))
    print(table(result))
    print(f"{result.faults.total()} faults, {len(result.wrong)} broken promises; {time.monotonic() - begin:.0f} s")
    print(*result.wrong[:20], sep="\n", end="\n" * bool(result.wrong))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
