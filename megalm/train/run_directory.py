"""A run's directory: whose it is, and that one run at a time writes to it.

Owns `config.yaml`, `run.json` (see `run_identity`) and `run.lock`. `metrics.jsonl` is `metrics_file`'s, `tensorboard/`
and `wandb/` are `sinks`', `profile/` is `profiling`'s, `rank_times.tsv` `stragglers`', `rank_memory.tsv` `memory`'s,
`checkpoints/` `megalm.checkpoint`'s, `logs/` the launcher's. Only rank 0 opens a run; anyone may check it, which writes
nothing. No torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megalm.checkpoint.names import CHECKPOINTS, find_checkpoints
from megalm.config.load import dump_yaml
from megalm.config.run import RunConfig
from megalm.config.yaml_text import sealed
from megalm.errors import CheckpointError, ConfigError
from megalm.files import partial_of, refused_write, sync_directory, write_durably
from megalm.models.sources import COMPANIONS, fingerprint
from megalm.train.run_identity import (
    DOOMED,
    IDENTITY_FILE,
    REMOVING,
    SAVED,
    identity_of,
    read_identity,
    refuse_other_run,
    run_identity,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"
DEAD_LOCK_S = 180.0  # NFS gives a dead client's locks free after 90 s
_POLL_S = 0.5
_TABLES = ("rank_times.tsv", "rank_memory.tsv", "inspect.jsonl", "inspect.png")
_OWNED_FILES = (CONFIG_FILE, "tokenizer.json", "metrics.jsonl", *_TABLES)
_OWNED_DIRECTORIES = (CHECKPOINTS, COMPANIONS, "profile", "tensorboard", "wandb")


@dataclass
class RunDirectory:
    """A run's directory, held by a lock until `close` or the death of the process."""

    path: Path
    resumed: bool
    """Whether a run with this identity was here already (it may still have no checkpoint)."""
    fresh: bool
    """Whether the run that is here is to be removed."""
    _lock: IO[str]
    _config: RunConfig
    _identity: dict[str, Any]

    def claim(self, companions: Mapping[str, bytes] | None = None) -> None:
        """Write `config.yaml` and `run.json`, with `fresh` after the removal of the run that was here.

        Called once all that could show the recipe to be wrong is done: from then on another recipe is refused here.
        `companions` are files by name for its directory `companions`, which exports want. Raises StorageError.
        """
        try:
            if self.fresh and read_identity(self.path) is not None:
                _write_identity(self.path, {**self._identity, REMOVING: True})
                _remove_run(self.path)
            for name, content in (companions or {}).items():
                (self.path / COMPANIONS).mkdir(exist_ok=True)
                write_durably(self.path / COMPANIONS / name, content)
            _write_identity(self.path, self._identity)
            _write_changed(self.path / CONFIG_FILE, sealed(dump_yaml(self._config)))
        except OSError as error:
            raise refused_write(error, self.path) from error

    def note_saved(self) -> None:
        """Remember that the run has a checkpoint: without one it does not begin again by itself from now on."""
        if not self._identity[SAVED]:
            try:
                _write_identity(self.path, {**self._identity, SAVED: True})
                self._identity[SAVED] = True
            except OSError as error:
                logger.warning("%s: cannot be written: %s", self.path / IDENTITY_FILE, error.strerror)

    def check_source(self) -> None:
        """Raise CheckpointError where the weights at `train.init_from` are no longer those that the run began with."""
        begun = self._identity["init_from"]
        if begun is not None and (found := fingerprint(Path(begun["path"]))) != begun["fingerprint"]:
            raise CheckpointError(
                f"train.init_from={begun['path']}: its fingerprint is {found[:12]}, not {begun['fingerprint'][:12]} "
                "when this run, which has saved nothing yet, began; begin anew with --fresh"
            )

    def close(self) -> None:
        """Give the directory free; safe to call twice."""
        self._lock.close()


def check_run(
    config: RunConfig, data_fingerprint: str, tokenizer_fingerprint: str, fresh: bool = False
) -> dict[str, Any] | None:
    """Return the identity of the run in `run.dir` (None: there is none yet) if this recipe and data may go on there.

    Writes nothing. Raises ConfigError for a directory that holds another run (naming the keys that differ; with
    `fresh` it may be any run, but that of the first weights), one whose checkpoints are gone, or files of an unknown
    one.
    """
    path = Path(config.run.dir)
    before = check_place(path)
    if before is not None and fresh:
        _refuse_links(path)
        _refuse_own_weights(config)
    elif before is not None:
        refuse_other_run(path, before, identity_of(config, data_fingerprint, tokenizer_fingerprint, before))
        if before.get(SAVED) and not before.get(REMOVING) and not find_checkpoints(path / CHECKPOINTS):
            raise ConfigError(
                f"run.dir={path}: this run saved checkpoints, and {path / CHECKPOINTS} holds none; mount or restore "
                "it, or --fresh to begin anew"
            )
    return before


def is_doomed(path: Path) -> bool:
    """Return whether the run in a directory is one that a start with `--fresh` was still to remove."""
    return bool((read_identity(path) or {}).get(DOOMED))


def check_place(path: Path) -> dict[str, Any] | None:
    """Return the identity of the run in a directory, None where a new one may be. Writes nothing.

    Raises ConfigError for one that holds files of an unknown run.
    """
    before = read_identity(path)
    if before is None:
        _refuse_unknown_files(path)
    return before


def open_run(
    config: RunConfig,
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    world: int,
    model_parameters: int,
    fresh: bool = False,
    restarted: bool = False,
) -> RunDirectory:
    """Make or re-open `run.dir` for this recipe and data, and lock it; `claim` then writes to it.

    With `fresh`, the metrics, checkpoints and recipe of the run that is here are to be removed; a removal that was
    killed half-way is ended here. `restarted`: a launcher starts the job again. What it was to remove is gone by then,
    unless it died before; and a dead node's lock is waited for, which network file systems keep for a while. Raises
    ConfigError for a directory that cannot be made, that another process trains in, and as `check_run` does;
    StorageError.
    """
    path = Path(config.run.dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, DEAD_LOCK_S if restarted else 0.0)
    except OSError as error:
        raise ConfigError(f"run.dir={path}: cannot be written ({error.strerror}); choose another run.dir") from error
    try:
        fresh = fresh and (is_doomed(path) or not restarted)
        before = check_run(config, data_fingerprint, tokenizer_fingerprint, fresh)
        for name in (*_OWNED_FILES, IDENTITY_FILE):  # of a process that was killed while it wrote
            partial_of(path / name).unlink(missing_ok=True)
        if before is not None and before.get(REMOVING):
            _remove_run(path)
        elif before is not None and fresh:
            _write_identity(path, {**before, DOOMED: True})
    except OSError as error:
        lock.close()
        raise refused_write(error, path) from error
    except BaseException:
        lock.close()
        raise
    begun = None if fresh else before
    identity = run_identity(config, data_fingerprint, tokenizer_fingerprint, world, model_parameters, begun)
    return RunDirectory(path, before is not None and not fresh, fresh, lock, config, identity)


def _lock(path: Path, patience_s: float) -> IO[str]:
    """Return the open lock file; the lock goes with the process, however it ends."""
    stream = (path / LOCK_FILE).open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience_s
    try:
        while not _try_lock(stream, last=time.monotonic() >= deadline):
            time.sleep(_POLL_S)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows EAGAIN and EACCES
        stream.seek(0)
        owner = stream.read().strip() or "another process"
        stream.close()
        raise ConfigError(
            f"run.dir={path}: {owner} trains in it at this moment; stop that run or choose another run.dir"
        ) from error
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s); two runs at once would not be noticed", path, error)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream


def _try_lock(stream: IO[str], last: bool) -> bool:
    """Take the lock and return True; False where another process holds it, or OSError if this is the last try."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if last:
            raise
        return False
    return True


def _refuse_unknown_files(path: Path) -> None:
    """Raise ConfigError when files that this run would overwrite lie in a directory without an identity."""
    found = [name for name in (*_OWNED_FILES, *_OWNED_DIRECTORIES) if (path / name).exists()]
    if found:
        raise ConfigError(
            f"run.dir={path} holds {', '.join(found)} but no {IDENTITY_FILE}, so whose they are is unknown; "
            "choose another run.dir"
        )


def _refuse_links(path: Path) -> None:
    """Raise ConfigError when removing the run would leave a part of it elsewhere."""
    for name in _OWNED_DIRECTORIES:
        if (path / name).is_symlink():
            raise ConfigError(f"{path / name} is a symbolic link, which --fresh does not follow; remove it yourself")


def _refuse_own_weights(config: RunConfig) -> None:
    """Raise ConfigError when removing the run would remove what the new one is to start with."""
    if config.train.init_from is None:
        return
    source, path = Path(config.train.init_from).resolve(), Path(config.run.dir).resolve()
    if source == path or path / CHECKPOINTS in (source, *source.parents):
        raise ConfigError(
            f"train.init_from={config.train.init_from} is in run.dir={config.run.dir}, which --fresh removes; choose "
            "another run.dir"
        )


def _remove_run(path: Path) -> None:
    """Remove the checkpoints, metrics and recipe of the run that was here; nothing else. Raises OSError."""
    for name in _OWNED_DIRECTORIES:
        if (path / name).exists():
            shutil.rmtree(path / name)
    for name in _OWNED_FILES:
        (path / name).unlink(missing_ok=True)
    sync_directory(path)


def _write_identity(path: Path, identity: Mapping[str, Any]) -> None:
    _write_changed(path / IDENTITY_FILE, json.dumps(identity, indent=1) + "\n")


def _write_changed(path: Path, text: str) -> None:
    """Write a file durably unless it holds the same already: a run that goes on needs no room on its disk for that."""
    content = text.encode()
    if not path.is_file() or path.read_bytes() != content:
        write_durably(path, content)
