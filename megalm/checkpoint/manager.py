"""The checkpoints of one run: which is the newest valid one, how many are kept, and what a dead run left.

Owns: `RUN/checkpoints`. Only the process group that trains makes a `CheckpointManager`, because it clears the
rests of interrupted saves; who only reads calls `latest_checkpoint`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megalm.checkpoint.blocks import unreadable
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.manifest import CHECKPOINT_NAME, FILE_NAME, HIDDEN_NAME, hidden
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.writer import restore, storage_error, write_checkpoint
from megalm.distributed.exchange import Group, broadcast_json, rank_of, size_of, together
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


def find_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints below `directory`, newest first, valid or not; none where there is no directory.

    Where a replacement was interrupted, the checkpoint that it set aside stands for the step. Raises
    CheckpointError.
    """
    found: dict[int, Path] = {}
    try:
        for path in directory.iterdir() if directory.is_dir() else ():
            final, aside = CHECKPOINT_NAME.fullmatch(path.name), HIDDEN_NAME.fullmatch(path.name)
            if final and path.is_dir():
                found[int(final[1])] = path
            elif aside and aside[3] == "replaced" and not path.with_name(aside[1]).is_dir():
                found.setdefault(int(aside[2]), path)
    except OSError as error:
        raise unreadable(directory, error) from error
    return [found[step] for step in sorted(found, reverse=True)]


def latest_checkpoint(run_dir: Path, group: Group = None, before: int | None = None) -> CheckpointReader | None:
    """Return the newest valid checkpoint of a run, the same on all ranks, or None where none was ever saved.

    `before`: only those of earlier steps count.

    Every rank of `group` must call; together they check every byte of a candidate, each rank its share (the
    files that the rank of its number wrote, which it will read itself when the layout is the same). A damaged
    one is passed over with a warning. Raises CheckpointError if there are checkpoints, but no valid one.
    """
    directory = run_dir / CHECKPOINTS
    names: list[str] = []
    with together(group):
        if rank_of(group) == 0:
            names = [path.name for path in find_checkpoints(directory) if before is None or step_of(path) < before]
    first_error = ""
    names = broadcast_json(names, group)
    for name in names:
        try:
            with together(group):
                reader = CheckpointReader(directory / name)
                reader.verify_files(_share(reader.manifest.files, group))
            return reader
        except CheckpointError as error:
            first_error = first_error or str(error)
            if rank_of(group) == 0:
                logger.warning("SKIPPING DAMAGED CHECKPOINT %s: %s", name, error)
    if names:
        raise CheckpointError(
            f"{directory}: none of its {len(names)} checkpoints is valid (newest: {first_error}); "
            "restore one from a copy, or move the directory away to begin anew"
        )
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step of a path that `find_checkpoints` gives."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name) or HIDDEN_NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1] if match.re is CHECKPOINT_NAME else match[2])


def _share(names: Iterable[str], group: Group) -> list[str]:
    """Return the files that this rank checks: over all ranks, each file once."""
    matches = [match for match in map(FILE_NAME.fullmatch, names) if match]
    return [match[0] for match in matches if int(match[1]) % size_of(group) == rank_of(group)]


class CheckpointManager:
    """Saves a run's checkpoints, keeps the newest ones, and finds the one to resume from."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        group: Group = None,
        layout: Mapping[str, Any] | None = None,
        files: FileSystem | None = None,
    ) -> None:
        """Clear what interrupted saves left (rank 0). Every rank of `group` must call (None: alone).

        `layout` (sizes of the mesh axes, ZeRO stage, ...) is noted in each checkpoint for people to read.
        Raises CheckpointError on all ranks.
        """
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep={keep} would keep no checkpoint; use 1 or more")
        self.run_dir, self.keep = run_dir, keep
        self.directory = run_dir / CHECKPOINTS
        self._group, self._layout, self._files = group, layout, files or FileSystem()
        with together(group):
            if rank_of(group) == 0:
                self._clear()

    def save(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, then delete what exceeds `keep`; see `write_checkpoint`."""
        path = write_checkpoint(self.directory, step, fragments, state, self._group, self._layout, self._files)
        if rank_of(self._group) == 0:
            self._retain(step)
        return path

    def latest(self, before: int | None = None) -> CheckpointReader | None:
        """Return the newest valid checkpoint, the same on all ranks. See `latest_checkpoint`."""
        return latest_checkpoint(self.run_dir, self._group, before)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps than `step`, to which the run went back. Raises CheckpointError."""
        with together(self._group):
            if rank_of(self._group) == 0:
                try:
                    for path in find_checkpoints(self.directory):
                        if step_of(path) > step:
                            self._delete(path)
                except OSError as error:
                    raise storage_error(error, self.directory) from error

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint such that a kill leaves it whole or hidden."""
        deleted = hidden(path, "deleted")
        self._files.remove_tree(deleted)
        self._files.rename(path, deleted)
        self._files.sync_directory(self.directory)
        self._files.remove_tree(deleted)

    def _retain(self, step: int) -> None:
        """Delete checkpoints older than the newest `keep`.

        Later steps than `step`, just saved, were passed over as damaged on resume: they neither count nor are
        deleted, and are replaced when the run gets there again.
        """
        try:
            named = [path for path in find_checkpoints(self.directory) if CHECKPOINT_NAME.fullmatch(path.name)]
            for path in [path for path in named if step_of(path) <= step][self.keep :]:
                self._delete(path)
        except OSError as error:
            logger.warning("%s: cannot delete an old checkpoint: %s", error.filename or self.directory, error.strerror)

    def _clear(self) -> None:
        try:
            for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
                match = HIDDEN_NAME.fullmatch(path.name)
                if match is None:
                    continue
                if match[3] == "replaced":
                    restore(self._files, path.with_name(match[1]))
                if path.exists():
                    logger.info("removing %s, left by an interrupted run", path)
                    self._files.remove_tree(path)
        except OSError as error:
            raise storage_error(error, self.directory) from error
