"""A run's directory made from another program's weights: what every import ends in.

Owns which files an imported run has: `config.yaml`, the tokenizer, one checkpoint, and `imported.json`, which says
where they come from. Evaluation, generation, export and `train.init_from` take it as they take a run of megalm's.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.names import CHECKPOINTS
from megalm.checkpoint.writer import write_checkpoint
from megalm.config.load import dump_yaml
from megalm.config.run import RunConfig
from megalm.config.yaml_text import sealed
from megalm.data.tokenizer import FILE_NAME, read_tokenizer_file
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError, StorageError

SOURCE_FILE = "imported.json"
FILE_BYTES = 256 << 20  # of tensors that are held until a file is written: an import is one process's
_TRAINING = {"steps": 1000, "global_batch": 8, "micro_batch": 1}  # a recipe says how it trains; these are to be changed
_RATE = 1e-5


def write_run(
    out: Path,
    model: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    source: Mapping[str, Any],
    optimizer: Iterable[Fragment] = (),
    state: Mapping[str, Any] | None = None,
    *,
    step: int = 0,
    precision: str = "fp32",
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the run's directory `out`, which must not be there or be empty, and return its checkpoint's path.

    `model` is the recipe's section (`ModelSection.model_dump(exclude_unset=True)`), `sections` others, such as optim.
    `tensors` are whole weights under their logical names, any dtype that a checkpoint holds, taken one by one;
    `optimizer` are fragments of its state. `tokenizer` is a `tokenizer.json`, `source` (JSON values) is noted in
    `imported.json` and with the checkpoint, whose `state` and `step` are as given. `beside` are further files by their
    names in the directory, at most one directory deep.

    The directory appears by a rename, whole and durable or not at all. Raises ConfigError for a section that is wrong,
    CheckpointError for a place that is taken and where the disk refuses a write.
    """
    require_free(out)
    given: dict[str, Any] = {"train": _TRAINING, "optim": {"lr": _RATE}, **(sections or {})}
    config = RunConfig.model_validate(
        {**given, "model": dict(model), "precision": precision, "run": {**given.get("run", {}), "dir": str(out)}}
    )
    with new_directory(out) as (files, partial):
        whole = {"config": config.model_dump(mode="json"), **(state or {}), "imported": dict(source)}
        fragments = _fragments(tensors, optimizer)
        path = write_checkpoint(
            partial / CHECKPOINTS, step, fragments, whole, layout={"imported": dict(source)}, file_bytes=FILE_BYTES
        )
        if tokenizer is not None:
            files.write_file(partial / FILE_NAME, read_tokenizer_file(tokenizer))
        files.write_file(partial / "config.yaml", sealed(dump_yaml(config)).encode())
        files.write_file(partial / SOURCE_FILE, (json.dumps(dict(source), indent=1) + "\n").encode())
        write_beside(files, partial, beside or {})
    return out / path.relative_to(partial)


def write_beside(files: FileSystem, directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by their names in a directory, at most one directory deep. Raises OSError."""
    for name, content in contents.items():
        files.make_directory((directory / name).parent)
        files.write_file(directory / name, content)
    for folder in {(directory / name).parent for name in contents}:
        files.sync_directory(folder)


def disk_error(error: OSError, path: Path) -> CheckpointError:
    """Return the one-line error for a place below `path` that cannot be written, or for a disk that fails."""
    words = os.strerror(error.errno) if error.errno else str(error)
    kind = StorageError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else CheckpointError
    return kind(f"{error.filename or path}: cannot be written: {words}; heal that, or give another --out")


def require_free(out: Path) -> None:
    """Raise CheckpointError where a directory to be made is there already with something in it, or is no directory."""
    if out.name in ("", ".."):
        raise CheckpointError(f"--out={out} is a place that is there; give the name of a new directory")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise CheckpointError(f"--out={out} is there already; give a directory that is not, or remove it first")


@contextmanager
def new_directory(out: Path) -> Iterator[tuple[FileSystem, Path]]:
    """Give a hidden directory to be filled, which becomes `out`, durably, and is removed after an error instead.

    Errors of the disk become those of `disk_error`.
    """
    files, partial = FileSystem(), out.with_name(f".{out.name}.partial")
    try:
        files.make_directory(partial.parent)
        files.remove_tree(partial)
        files.make_directory(partial)
        yield files, partial
        files.sync_directory(partial)
        if out.exists():
            out.rmdir()  # empty, see `require_free`
        files.rename(partial, out)
        files.sync_directory(out.parent)
    except OSError as error:
        raise disk_error(error, partial) from error
    finally:
        files.remove_tree(partial)


def _fragments(tensors: Iterable[tuple[str, Tensor]], optimizer: Iterable[Fragment]) -> Iterator[Fragment]:
    for name, values in tensors:
        yield Fragment(ShardSpec.whole(name, tuple(values.shape)), "weight", 0, values.reshape(-1))
    yield from optimizer
