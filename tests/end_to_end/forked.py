"""`megalm train` as forks of this process, which has imported everything: a start takes no seconds of imports.

Launcher and workers are processes of their own, with the sessions, pipes, environments and death signals of the real
ones, and run the same code; left out is `exec` alone. Every worker notes in a ledger what its loader gives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

LEDGER = "TEST_LEDGER"
"""The variable that tells a worker where its ledger is; its rank is added to the name."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
_PR_SET_NAME = 15
_POLL_S = 0.005


def import_everything() -> None:
    """Import what a run needs, DeepSpeed included, and start no thread."""
    for name in ("cli", "commands", "launch.local", "train.pretrain", "zero.deepspeed_engine"):
        importlib.import_module(f"megalm.{name}")
    import torch

    torch.set_num_threads(1)


class Forked:
    """What `subprocess.Popen` is to its user, for the command line `megalm ARGUMENTS` in a fork of this process."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        assert stdin == subprocess.DEVNULL and list(command[1:3]) == ["-m", "megalm"], command
        piped = stdout == subprocess.PIPE
        pipes = (os.pipe(), os.pipe()) if piped else ()
        outputs = [write for _, write in pipes] if piped else [stdout.fileno(), stderr.fileno()]
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(command[3:], env, cwd, outputs, start_new_session, preexec_fn)
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr = [os.fdopen(read, "rb") for read, _ in pipes] or [None, None]

    def poll(self) -> int | None:
        """Return the exit status, None while it runs; -N where signal N ended it."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit status. Raises TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_POLL_S)
        assert self.returncode is not None
        return self.returncode


def _become(
    arguments: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None,
    outputs: Sequence[int],
    new_session: bool,
    prepare: Callable[[], None] | None,
) -> NoReturn:
    """Be the command line from here on, as a new program would be: signals, session, output, environment."""
    status = 70
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if new_session:
            os.setsid()
        if prepare is not None:
            prepare()
        if cwd is not None:
            os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, descriptor in zip((1, 2), outputs, strict=True):
            os.dup2(descriptor, target)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        from megalm.cli import main
        from megalm.launch import local

        parts = {name: getattr(subprocess, name) for name in ("DEVNULL", "PIPE")}
        local.subprocess = SimpleNamespace(Popen=Forked, **parts)  # type: ignore[assignment]
        if "RANK" in env:
            ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank-{env['RANK']}".encode())
        _keep_ledger(Path(f"{env[LEDGER]}.{env.get('RANK', 0)}"))
        status = main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _keep_ledger(path: Path) -> None:
    """Have every batch noted in a line of its own: its first sample, and a hash of its tokens, labels and mask."""
    from megalm.data.loader import Batch, Loader

    batch = getattr(Loader.batch, "plain", Loader.batch)  # a rank is forked from a launcher, which has a ledger too
    ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(self: Loader, first_sample: int, global_batch: int, rows: int) -> Batch:
        found = batch(self, first_sample, global_batch, rows)
        digest = hashlib.sha256()
        for part in (found.tokens_BT, found.labels_BT, found.loss_mask_BT):
            digest.update(part.numpy().tobytes())
        os.write(ledger, json.dumps([first_sample, global_batch, digest.hexdigest()]).encode() + b"\n")
        return found

    noted.plain = batch  # type: ignore[attr-defined]
    Loader.batch = noted  # type: ignore[method-assign]


def read_ledger(path: Path, rank: int) -> dict[int, set[tuple[int, str]]]:
    """Return what a rank was given, by first sample; more than one entry: it was not always the same."""
    found: dict[int, set[tuple[int, str]]] = {}
    for line in Path(f"{path}.{rank}").read_text().splitlines():
        first, size, digest = json.loads(line)
        found.setdefault(first, set()).add((size, digest))
    return found
