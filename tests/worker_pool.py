"""Processes that are started once and then serve many tests, each test in a fresh world of torch.distributed.

Importing torch takes seconds, so a test that needs n ranks borrows n waiting processes instead of starting them:

    def total(rank: int, value: float) -> float:          # a module-level function of an importable module
        x = torch.tensor([value * rank])
        dist.all_reduce(x)
        return x.item()

    def test_total(pool):
        assert pool.run(total, 2.0, world=3) == [6.0, 6.0, 6.0]

With `layout=RankLayout(...)` in place of `world=n` the function gets a `ParallelMesh` in place of the rank.
Arguments and results travel by pickle. An exception in any rank reaches the test as `WorkerError` with the
tracebacks. A rank that hangs or dies costs the test, and a new process takes its place for the next one.

Libraries that keep globals of their own about the world (DeepSpeed does) are forgotten between worlds by callables in
`at_world_end`: a module that imports such a library in a worker appends its reset there, once, at its own import.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT_S = 120.0
FAILURE_GRACE_S = 5.0  # how long the other ranks may go on after one has failed
END_TIMEOUT_S = 20.0  # how long a rank may take to leave its world
_PR_SET_PDEATHSIG = 1
_modules_passed = 0  # in a worker: how many modules were imported when the collector was last told to pass over them

at_world_end: list[Callable[[], None]] = []
"""Called in a worker, in order, at the end of each world that was formed, while it still stands."""


class WorkerError(AssertionError):
    """Some rank of a pooled test failed, died or hung; the message holds what each of them said."""


@dataclass(frozen=True)
class _Job:
    """One call as a worker gets it; `call` is the pickled (function, args, layout)."""

    call: bytes
    sys_path: list[str]
    prefix: str
    rank: int
    world: int
    port: int
    timeout_s: float


@dataclass
class _Worker:
    """The parent's end of one worker."""

    process: Any
    pipe: connection.Connection
    log: Path


class WorkerPool:
    """At most `size` worker processes, each started when a world first needs it."""

    def __init__(self, size: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Start nothing yet. `timeout_s` bounds every call that gives no time-out of its own."""
        self.size = size
        self.timeout_s = timeout_s
        self._workers: list[_Worker | None] = [None] * size
        self._worlds = 0
        self._store: Any = None
        self._directory = tempfile.TemporaryDirectory(prefix="worker-pool-")
        # Workers fork from a server that has imported torch but has started no thread: one import for all of them,
        # and a dead one is replaced in milliseconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed"])
        atexit.register(self.close)

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world: int | None = None,
        layout: Any = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Return [function(rank or mesh, *args) of rank 0, of rank 1, ...] from a fresh world.

        Give `world` (the function gets its rank) or `layout`, a RankLayout (it gets its ParallelMesh).
        Raises WorkerError when a rank raises, dies, or is not done within `timeout_s`.
        """
        world = layout.world_size if layout is not None else world
        assert world is not None and 1 <= world <= self.size, f"world of {world} in a pool of {self.size}"
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        call = pickle.dumps((function, args, layout))
        self._worlds += 1
        workers = [self._worker(rank) for rank in range(world)]
        for rank, worker in enumerate(workers):
            job = _Job(call, sys.path, f"world-{self._worlds}", rank, world, self._port(), limit_s)
            worker.pipe.send(job)
        try:
            answers = self._collect(workers, "result", limit_s, FAILURE_GRACE_S)
            self._end(workers, answers)
        except BaseException:  # the test runner's own time-out or Ctrl-C: nobody knows what the workers do now
            self.close()
            raise
        failures = {rank: text for rank, (good, text) in answers.items() if not good}
        if failures:
            name = getattr(function, "__name__", str(function))
            parts = [f"{name}: rank {rank} of {world}: {text}" for rank, text in failures.items()]
            raise WorkerError("\n".join(parts))
        return [pickle.loads(answers[rank][1]) for rank in range(world)]

    def process_id(self, rank: int) -> int:
        """Return the process id of the worker that plays `rank`."""
        return int(self._worker(rank).process.pid)

    def close(self) -> None:
        """End all workers."""
        for rank in range(self.size):
            self._discard(rank)
        self._store = None

    def _port(self) -> int:
        """Return the port of the store that all worlds share under different prefixes."""
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def _worker(self, rank: int) -> _Worker:
        worker = self._workers[rank]
        if worker is not None and worker.process.is_alive():
            return worker
        ours, theirs = self._context.Pipe()
        log = Path(self._directory.name) / f"worker-{rank}.log"
        process = self._context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        process.start()
        theirs.close()
        worker = self._workers[rank] = _Worker(process, ours, log)
        return worker

    def _discard(self, rank: int) -> None:
        worker, self._workers[rank] = self._workers[rank], None
        if worker is not None:
            worker.process.kill()
            worker.process.join(5)
            worker.pipe.close()

    def _collect(
        self, workers: list[_Worker], kind: str, limit_s: float, grace_s: float
    ) -> dict[int, tuple[bool, Any]]:
        """Return {rank: (good, pickled result or text)} in the order of arrival; kill and replace who is late."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < len(workers):
            waiting = {worker.pipe: rank for rank, worker in enumerate(workers) if rank not in answers}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill_late(workers, [waiting[pipe] for pipe in waiting], answers)
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    said, good, value = workers[rank].pipe.recv()
                    assert said == kind, f"worker {rank} said {said} where {kind} was expected"
                    answers[rank] = (good, value)
                except (EOFError, ConnectionResetError):
                    workers[rank].process.join(5)
                    code = workers[rank].process.exitcode
                    answers[rank] = (False, f"the process died (exit code {code})\n{_tail(workers[rank].log)}")
                    self._discard(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + grace_s)
        return answers

    def _kill_late(self, workers: list[_Worker], late: Iterable[int], answers: dict[int, tuple[bool, Any]]) -> None:
        late = list(late)
        for rank in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[rank].process.pid, signal.SIGUSR1)  # the worker writes its stacks to its log
        time.sleep(0.2)
        for rank in late:
            self._discard(rank)
            answers[rank] = (False, f"did not answer in time and was killed\n{_tail(workers[rank].log)}")

    def _end(self, workers: list[_Worker], answers: dict[int, tuple[bool, Any]]) -> None:
        """Let the ranks leave their world together: none closes its connections while another still reads."""
        alive = [worker for rank, worker in enumerate(workers) if self._workers[rank] is worker]
        for rank, worker in enumerate(workers):
            if worker in alive and answers[rank][0]:
                with contextlib.suppress(OSError):
                    worker.pipe.send("end")
        ranks = [rank for rank, worker in enumerate(workers) if worker in alive]
        ends = self._collect(alive, "ended", END_TIMEOUT_S, END_TIMEOUT_S)
        for position, (good, text) in ends.items():
            rank = ranks[position]
            if not good:
                self._discard(rank)
                if answers[rank][0]:
                    answers[rank] = (False, f"while leaving the world: {text}")


def _tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def _serve(pipe: connection.Connection, log: str) -> None:
    """Run jobs until the parent is gone. Everything that is printed goes to `log`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test runner's to handle
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(1)
    stores: dict[int, Any] = {}
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        os.ftruncate(output, 0)
        _work(pipe, job, stores)


def _work(pipe: connection.Connection, job: _Job, stores: dict[int, Any]) -> None:
    """Answer ("result", good, value) and then ("ended", good, text)."""
    good, value = _call(job, stores)
    pipe.send(("result", good, value))
    if good:
        pipe.recv()
    try:
        _leave_world()
        pipe.send(("ended", True, ""))
    except Exception:
        pipe.send(("ended", False, traceback.format_exc()))


def _call(job: _Job, stores: dict[int, Any]) -> tuple[bool, Any]:
    import torch.distributed as dist

    try:
        sys.path[:] = job.sys_path
        function, args, layout = pickle.loads(job.call)
        os.environ.update(
            RANK=str(job.rank),
            WORLD_SIZE=str(job.world),
            LOCAL_RANK=str(job.rank),
            LOCAL_WORLD_SIZE=str(job.world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job.port),
        )
        timeout = timedelta(seconds=job.timeout_s)
        if job.port not in stores:
            stores[job.port] = dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=timeout)
        store = dist.PrefixStore(job.prefix, stores[job.port])
        dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world, timeout=timeout)
        first: Any = job.rank
        if layout is not None:
            import torch

            from megalm.distributed.mesh import ParallelMesh

            first = ParallelMesh.create(layout, torch.device("cpu"))
        return True, pickle.dumps(function(first, *args))
    except BaseException:  # SystemExit too: the process goes on serving
        return False, traceback.format_exc()


def _leave_world() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        for reset in at_world_end:
            reset()
        dist.destroy_process_group()
    gc.collect()  # trainers and engines are cycles that hold whole models, and groups with their threads
    _pass_over_modules()


def _pass_over_modules() -> None:
    """Take what imports have made out of the collector's sight: it would read all of it again after each world.

    With torch and DeepSpeed that is ten times the time that a small world takes.
    """
    global _modules_passed
    if len(sys.modules) != _modules_passed:
        _modules_passed = len(sys.modules)
        gc.freeze()
