"""Worker processes on this machine, one a rank: started, listened to and ended together. No torch.

What the workers do is the command's matter; `megalm.distributed.rendezvous` reads the variables that are set here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from megalm.errors import Interrupted, LaunchError, UserError

_GRACE_S = 1.0  # from the first failure on: time for the others to say the same, or the cause, and end by themselves
_TERMINATE_S = 10.0  # between SIGTERM and SIGKILL
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_SEEN_LINES = 10_000
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
# Ends the workers' process groups when its standard input closes, as it does when the launcher is killed.
_WATCH = """
import os, signal, sys
sys.stdin.buffer.read()
for pid in map(int, sys.argv[1:]):
    try: os.killpg(pid, signal.SIGKILL)
    except OSError: pass
"""


def run_workers(command: Sequence[str], nproc: int, log_dir: Path | None, held: Sequence[signal.Signals] = ()) -> int:
    """Run `nproc` copies of `command` as ranks 0 .. nproc-1 of one world and return the exit status for all.

    0 if all ended with 0, 75 if they were interrupted and can go on later; otherwise the first failure's (2, the user's
    mistake, goes before others within a second; a worker that a signal ended counts as 1), after the others have been
    ended: SIGTERM, and SIGKILL 10 s later. SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on; if the workers end by
    one of the first three the status is 128 + signal. Workers start with the signals in `held` blocked, for a command
    that takes them later. No worker outlives this process.

    Rank 0's output goes to the console as it is; of the others only standard error, as `[rank N] line`; a line of
    standard error that another rank has shown already is left out. Every rank's output is appended to
    log_dir/rank-N.log, standard output and error together, without colours. Raises LaunchError, with no worker
    started, for a log_dir that cannot be made.
    """
    assert nproc >= 1, f"{nproc} workers"
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(f"{log_dir}: cannot be made ({error.strerror}); choose another run.dir") from error
    console = _Console()
    port = _free_port()
    workers: list[_Worker] = []
    with contextlib.ExitStack() as cleanup:
        received = cleanup.enter_context(_forwarded_signals(workers))
        cleanup.callback(_end, workers)
        for rank in range(nproc):
            log = None if log_dir is None else cleanup.enter_context(open(log_dir / f"rank-{rank}.log", "ab"))
            workers.append(_Worker(command, rank, nproc, port, log, console, held))
        if sys.platform != "linux":
            cleanup.enter_context(_watcher(workers))
        return _wait(workers, received, console, log_dir)


class _Worker:
    """One rank's process and the threads that read what it says."""

    def __init__(
        self,
        command: Sequence[str],
        rank: int,
        nproc: int,
        port: int,
        log: BinaryIO | None,
        console: _Console,
        held: Sequence[signal.Signals],
    ) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(rank, nproc, port),
            start_new_session=True,  # a group of its own: ended with its children; Ctrl-C comes through the launcher
            preexec_fn=before_start(os.getpid(), held),
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        lock = threading.Lock()  # standard output and error share the log
        self._readers = [
            threading.Thread(target=_read, args=(source, show, log, lock), daemon=True)
            for source, show in (
                (self.process.stdout, console.write if rank == 0 else None),
                (self.process.stderr, lambda data: console.error(rank, data)),
            )
        ]
        for reader in self._readers:
            reader.start()

    def send(self, number: int) -> None:
        """Send a signal to the worker and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def finish_output(self) -> None:
        """Wait for what the ended worker has still to say; a stray grandchild may hold the pipe open."""
        for reader in self._readers:
            reader.join(2.0)


class _Console:
    """What the user sees of all ranks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[bytes, int] = {}

    def write(self, data: bytes) -> None:
        """Show rank 0's output."""
        with self._lock:
            _write(1, data)

    def error(self, rank: int, line: bytes) -> None:
        """Show a line of standard error, unless another rank has shown the same."""
        text = line.strip()
        with self._lock:
            if self._seen.setdefault(text, rank) != rank or (rank > 0 and not text):
                return
            if len(self._seen) > _SEEN_LINES:
                del self._seen[next(iter(self._seen))]
            _write(2, line if rank == 0 else b"[rank %d] %s" % (rank, line))

    def say(self, line: str) -> None:
        """Show a line of the launcher's own."""
        with self._lock:
            _write(2, f"{line}\n".encode())


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`; a console that is gone stops nothing."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def _read(source: BinaryIO, show: Callable[[bytes], None] | None, log: BinaryIO | None, lock: threading.Lock) -> None:
    """Pass on line by line what comes from `source`, and at once what a progress display writes without a newline."""
    rest = b""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        if rest.startswith(b"\x1b") or b"\r" in rest or len(rest) > 65536:
            lines, rest = [*lines, rest], b""
            ends = [b"\n"] * (len(lines) - 1) + [b""]
        else:
            ends = [b"\n"] * len(lines)
        for line, end in zip(lines, ends, strict=True):
            _pass_on(line + end, show, log, lock)
    if rest:
        _pass_on(rest + b"\n", show, log, lock)


def _pass_on(data: bytes, show: Callable[[bytes], None] | None, log: BinaryIO | None, lock: threading.Lock) -> None:
    if show is not None:
        show(data)
    if log is not None:
        with lock, contextlib.suppress(OSError, ValueError):  # a full disk must not stop the run; closed at the end
            log.write(_ESCAPES.sub(b"", data))
            log.flush()


def _wait(workers: list[_Worker], received: list[int], console: _Console, log_dir: Path | None) -> int:
    """Return the status once all have ended by themselves or, after a time of grace for the others, one has failed."""
    first, deadline = 0, float("inf")
    while True:
        ended = {worker.rank: worker.process.poll() for worker in workers}
        failed = {rank: code for rank, code in ended.items() if code not in (None, 0, Interrupted.exit_status)}
        if failed and deadline == float("inf"):
            first, deadline = next(iter(failed)), time.monotonic() + _GRACE_S
        if None not in ended.values() or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    if not failed:
        return max(code for code in ended.values() if code is not None)
    rank, code = next(((r, c) for r, c in failed.items() if c == UserError.exit_status), (first, failed[first]))
    assert code is not None
    workers[rank].finish_output()
    if code > 0:
        return code
    number = -code
    if number in received:
        return 128 + number
    where = "" if log_dir is None else f"; see {log_dir / f'rank-{rank}.log'}"
    hint = ", perhaps for want of memory" if number == signal.SIGKILL else ""
    console.say(f"error: rank {rank} was ended by {signal.Signals(number).name}{hint}{where}")
    return 1


def _end(workers: list[_Worker]) -> None:
    """End all workers that still run, and their children; then read their last words."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [worker for worker in workers if worker.process.poll() is None]
        for worker in running:
            worker.send(number)
        deadline = time.monotonic() + _TERMINATE_S
        while any(worker.process.poll() is None for worker in running) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    for worker in workers:
        worker.send(signal.SIGKILL)  # what a worker left behind in its group
        worker.finish_output()


@contextlib.contextmanager
def _forwarded_signals(workers: list[_Worker]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 on to the workers; gives the list of those that came to stop them."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        if number != signal.SIGUSR2:  # has them write their stacks
            received.append(number)
        for worker in workers:
            worker.send(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if handler is None else handler)  # None: faulthandler's, see cli


@contextlib.contextmanager
def _watcher(workers: list[_Worker]) -> Iterator[None]:
    """Have the workers ended if this process is killed, where the kernel does not do it."""
    pids = [str(worker.process.pid) for worker in workers]
    command = [sys.executable, "-c", _WATCH, *pids]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def before_start(parent: int, held: Sequence[signal.Signals]) -> Callable[[], None]:
    """Return what a new worker runs first: it holds signals back, and on Linux is ended together with the launcher."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the launcher died in between
                os._exit(1)

    return prepare


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return a worker's environment: the five variables of the rendezvous, and threads that share the cores."""
    # What an outer torchrun left speaks of another world.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        PYTHONUNBUFFERED="1",
    )
    environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a waiting receive must not hold up a collective
    if rank == 0 and os.isatty(1):  # its output passes through a pipe, but ends on a terminal
        size = shutil.get_terminal_size()
        for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", str(size.columns)), ("LINES", str(size.lines))):
            environ.setdefault(name, value)
    return environ


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
