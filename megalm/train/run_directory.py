"""A run's directory: whose it is, and that one run at a time writes to it.

Owns `config.yaml`, `run.json` (the identity) and `run.lock`. `metrics.jsonl` is `tracking`'s, `tensorboard/` and
`wandb/` are `sinks`', `profile/` is `profiling`'s, `rank_times.tsv` `stragglers`', `rank_memory.tsv` `memory`'s,
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
from megalm.config.optim import OptimRule
from megalm.config.run import RunConfig, section_types
from megalm.config.storage import masters_dtype, wide_dtype
from megalm.config.yaml_text import sealed
from megalm.errors import CheckpointError, ConfigError
from megalm.files import partial_of, refused_write, require_regular, sync_directory, write_durably
from megalm.models.sources import COMPANIONS, fingerprint
from megalm.version import __version__

logger = logging.getLogger(__name__)

IDENTITY_FILE = "run.json"
CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"
FORMAT = "megalm-run-1"
_POLL_S = 0.5
_LARGEST_IDENTITY = 4 << 20
_SAVED, _REMOVING = "saved", "removing"
"""Of `run.json`: whether a checkpoint was ever saved, and whether the run before this one is still being removed."""
_TABLES = ("rank_times.tsv", "rank_memory.tsv", "inspect.jsonl", "inspect.png")
_OWNED_FILES = (CONFIG_FILE, "tokenizer.json", "metrics.jsonl", *_TABLES)
_OWNED_DIRECTORIES = (CHECKPOINTS, COMPANIONS, "profile", "tensorboard", "wandb")

# What may differ from one start of a run to the next. First where and how it is computed; the data's path is free
# because its fingerprint is held instead, so prepared data may be moved, and so is that of first weights.
FREE_SECTIONS = frozenset(
    {
        *("run", "parallel", "zero", "overlap", "log", "checkpoint", "evaluate", "stability", "profile", "inspect"),
        "early_stop",
    }
)
FREE_KEYS = frozenset(
    {
        "train.stop_at",
        "train.micro_batch",
        "train.pad_batch",
        "train.recompute",
        "train.recompute_every",
        "train.offload_activations",
        "train.compile",
        "data.path",
        "train.init_from",
        "model.kernels",
        "model.flash_attention",
        "loss.fused_head",
    }
)
# Then what people change in a run's course. It changes what is computed from then on, so each start says what is
# another than in the checkpoint (`continuing.changes`). The optimizer's state and the order of samples stay as they
# are; the learning rate is one of the step's number, and batches are counted on from those that were.
COURSE_SECTIONS = frozenset({"lr_schedule", "batch_ramp"})
COURSE_KEYS = frozenset(
    {
        *("train.steps", "train.tokens", "train.epochs", "train.global_batch"),
        *("train.clip_grad_norm", "train.clip_grad_value"),
        *("optim.lr", "optim.adamw_lr", "optim.weight_decay"),
    }
)


@dataclass
class RunDirectory:
    """A run's directory, held by a lock until `close` or the death of the process."""

    path: Path
    resumed: bool
    """Whether a run with this identity was here already (it may still have no checkpoint)."""
    _lock: IO[str]
    _config: RunConfig
    _identity: dict[str, Any]
    _fresh: bool

    def claim(self, companions: Mapping[str, bytes] | None = None) -> None:
        """Write `config.yaml` and `run.json`, with `fresh` after the removal of the run that was here.

        Called once all that could show the recipe to be wrong is done: from then on another recipe is refused here.
        `companions` are files by name for its directory `huggingface`, which exports want. Raises StorageError.
        """
        try:
            if self._fresh and read_identity(self.path) is not None:
                self._write_identity({**self._identity, _REMOVING: True})
                _remove_run(self.path)
            for name, content in (companions or {}).items():
                (self.path / COMPANIONS).mkdir(exist_ok=True)
                write_durably(self.path / COMPANIONS / name, content)
            self._write_identity(self._identity)
            _write_changed(self.path / CONFIG_FILE, sealed(dump_yaml(self._config)))
        except OSError as error:
            raise refused_write(error, self.path) from error

    def note_saved(self) -> None:
        """Remember that the run has a checkpoint: without one it does not begin again by itself from now on."""
        if not self._identity[_SAVED]:
            self._identity[_SAVED] = True
            try:
                self._write_identity(self._identity)
            except OSError as error:
                logger.warning("%s: cannot be written: %s", self.path / IDENTITY_FILE, error.strerror)

    def _write_identity(self, identity: Mapping[str, Any]) -> None:
        _write_changed(self.path / IDENTITY_FILE, json.dumps(identity, indent=1) + "\n")

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
        _refuse_other_run(path, before, _identity(config, data_fingerprint, tokenizer_fingerprint, before))
        if before.get(_SAVED) and not before.get(_REMOVING) and not find_checkpoints(path / CHECKPOINTS):
            raise ConfigError(
                f"run.dir={path}: this run saved checkpoints, and {path / CHECKPOINTS} holds none; mount or restore "
                "it, or --fresh to begin anew"
            )
    return before


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
    patience_s: float = 0.0,
) -> RunDirectory:
    """Make or re-open `run.dir` for this recipe and data, and lock it; `claim` then writes to it.

    With `fresh`, the metrics, checkpoints and recipe of the run that is here are to be removed; a removal that was
    killed half-way is ended here. Another process that holds the lock is waited for `patience_s`: a network file system
    keeps a dead node's lock for a while. Raises ConfigError for a directory that cannot be made, that another process
    trains in, and as `check_run` does; StorageError.
    """
    path = Path(config.run.dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, patience_s)
    except OSError as error:
        raise ConfigError(f"run.dir={path}: cannot be written ({error.strerror}); choose another run.dir") from error
    try:
        before = check_run(config, data_fingerprint, tokenizer_fingerprint, fresh)
        for name in (*_OWNED_FILES, IDENTITY_FILE):  # of a process that was killed while it wrote
            partial_of(path / name).unlink(missing_ok=True)
        if before is not None and before.get(_REMOVING):
            _remove_run(path)
    except OSError as error:
        lock.close()
        raise refused_write(error, path) from error
    except BaseException:
        lock.close()
        raise
    begun = None if fresh else before
    identity = run_identity(config, data_fingerprint, tokenizer_fingerprint, world, model_parameters, begun)
    return RunDirectory(path, before is not None and not fresh, lock, config, identity, fresh)


def run_identity(
    config: RunConfig,
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    world: int,
    model_parameters: int,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what `run.json` holds of a run, which goes on with the one that `before` describes (None: a new one)."""
    return {
        "format": FORMAT,
        "megalm": __version__,
        _SAVED: bool((before or {}).get(_SAVED)),
        "world": world,
        "model_parameters": model_parameters,
        **_identity(config, data_fingerprint, tokenizer_fingerprint, before),
    }


def _identity(
    config: RunConfig, data_fingerprint: str, tokenizer_fingerprint: str, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the part of a run's identity that a resume is compared with."""
    return {
        "init_from": _first_weights(config, before),
        "data_fingerprint": data_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "data_path": config.data.path,
        "fixed": fixed_settings(config),
    }


def _first_weights(config: RunConfig, before: dict[str, Any] | None) -> dict[str, str] | None:
    """Return path and fingerprint of the weights that a run starts with.

    A run that was begun keeps those of its start: what has become of their source is nothing to a resume, so only
    another path is looked at.
    """
    path = config.train.init_from
    known: dict[str, str] | None = (before or {}).get("init_from")
    if path is None or (known is not None and known["path"] == path):
        return None if path is None else known
    return {"path": path, "fingerprint": fingerprint(Path(path))}


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return, by dotted key, the settings that make a run what it is and that may not change on a resume."""
    kept = _fixed(config.model_dump(mode="json"))
    masters = masters_dtype(config)
    return kept if masters == wide_dtype(config) else {**kept, "master weights": masters}


def _fixed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by dotted key, the fixed settings of a recipe given as JSON values."""
    flat: dict[str, Any] = {}
    for name, section in recipe.items():
        if isinstance(section, dict):
            flat.update({f"{name}.{key}": value for key, value in section.items()})
        else:
            flat[name] = section
    return {key: value for key, value in flat.items() if _is_fixed(key)}


def differing_settings(recipe: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return the fixed settings in which a checkpoint's recipe (JSON values) differs from `config`, with both values.

    A key that only one of them has is as if it had its default there; an empty recipe differs in nothing.
    """
    if not recipe:
        return []
    return _differences(_fixed(recipe), _fixed(config.model_dump(mode="json")), "in the checkpoint")


def _differences(before: dict[str, Any], now: dict[str, Any], place: str) -> list[str]:
    old, new = _with_defaults(before), _with_defaults(now)
    return [
        f"{key}={_show(old.get(key))} {place}, {_show(new.get(key))} here"
        for key in sorted({*old, *new})
        if _is_fixed(key) and old.get(key) != new.get(key)
    ]


def _is_fixed(key: str) -> bool:
    return key.partition(".")[0] not in FREE_SECTIONS | COURSE_SECTIONS and key not in FREE_KEYS | COURSE_KEYS


def read_identity(path: Path) -> dict[str, Any] | None:
    """Return a run directory's `run.json`, None where there is none. Raises ConfigError for a foreign one."""
    try:
        require_regular(path / IDENTITY_FILE)
        with (path / IDENTITY_FILE).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_IDENTITY + 1)
        if len(text) > _LARGEST_IDENTITY:
            raise ValueError(f"longer than {_LARGEST_IDENTITY} characters")
        identity = json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path / IDENTITY_FILE}: cannot be read ({reason}); choose another run.dir") from error
    parts = {"data_fingerprint": str, "tokenizer_fingerprint": str, "data_path": str, "fixed": dict}
    whole = isinstance(identity, dict) and all(isinstance(identity.get(name), kind) for name, kind in parts.items())
    if not whole or identity.get("format") != FORMAT:
        raise ConfigError(f"{path / IDENTITY_FILE}: not the identity of a run of this version; choose another run.dir")
    return identity


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


def _refuse_other_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError when the identities differ, naming each setting with both values.

    A key that the run was started without, as it came later, had what is its default now; one that may change by now
    does not count.
    """
    differences = _differences(before["fixed"], now["fixed"], "there")
    for name, label in (("data_fingerprint", "data"), ("tokenizer_fingerprint", "tokenizer")):
        if before[name] != now[name]:
            differences.append(
                f"{label} fingerprint {before[name][:12]} there ({before['data_path']}), "
                f"{now[name][:12]} here ({now['data_path']})"
            )
    weights = [(each.get("init_from") or {}).get("fingerprint", "none") for each in (before, now)]
    if weights[0] != weights[1]:
        differences.append(f"first weights (train.init_from) {weights[0][:12]} there, {weights[1][:12]} here")
    if differences:
        raise ConfigError(
            f"run.dir={path} holds another run: {'; '.join(differences)}; choose another run.dir, "
            "or --fresh to remove that run"
        )


def _with_defaults(fixed: dict[str, Any]) -> dict[str, Any]:
    whole = {**defaults(), **fixed}
    fields = OptimRule.model_fields.items()
    own = {key: field.get_default() for key, field in fields if not field.is_required()}
    return {**whole, "optim.rules": [{**own, **rule} for rule in whole["optim.rules"]]}


def defaults() -> dict[str, Any]:
    """Return the default of every key of a section that has one, as JSON has it."""
    found = {
        f"{section}.{key}": field.get_default()
        for section, kind in section_types().items()
        for key, field in kind.model_fields.items()
        if not field.is_required() and _is_fixed(f"{section}.{key}")
    }
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values


def _show(value: object) -> str:
    return json.dumps(value)


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


def _write_changed(path: Path, text: str) -> None:
    """Write a file durably unless it holds the same already: a run that goes on needs no room on its disk for that."""
    content = text.encode()
    if not path.is_file() or path.read_bytes() != content:
        write_durably(path, content)
