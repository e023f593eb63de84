"""The checkpoints of one run: which is the newest valid one, how many are kept, and what a dead run left.

Owns: `RUN/checkpoints`. Only the process group that trains makes a `CheckpointManager`, because it clears the
rests of interrupted saves; who only reads calls `latest_checkpoint`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalm.checkpoint.background import Flight, Saved, try_to_save
from megalm.checkpoint.blocks import REMEDY
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.names import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    HIDDEN_NAME,
    checkpoint_name,
    find_checkpoints,
    hidden,
    step_of,
)
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.retention import Keep, metric_of, stored_metric, superfluous
from megalm.checkpoint.snapshot import Snapshot
from megalm.checkpoint.writer import encode_state, restore, storage_error, write_and_count
from megalm.distributed.exchange import Group, broadcast_json, rank_of, size_of, together
from megalm.distributed.meeting import Meeting
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError, DamagedCheckpoint, OutOfMemory

logger = logging.getLogger(__name__)

Load = Callable[[CheckpointReader], None]

PATIENCE_S = 10.0
"""So long a save on its way may write nothing before a program that ends leaves it."""


def latest_checkpoint(
    run_dir: Path,
    load: Load | None = None,
    group: Group = None,
    before: Sequence[int] = (),
    passed_over: dict[int, str] | None = None,
) -> CheckpointReader | None:
    """Return a run's newest checkpoint that `load` finds whole, the same on all ranks; None where none was ever saved.

    `load` reads what is wanted, in one pass with its checks (None: every rank checks every byte). Where it raises
    DamagedCheckpoint, which it must do on all ranks or on none, the checkpoint is passed over and the next older one is
    loaded; one that its run has deleted meanwhile is no damage, and what was saved since is looked at. Other errors,
    such as a format of a later program, are the caller's. `before`: those of steps before the first of these are tried
    first, then those before the next one, at last all others. `passed_over` gets, by step, why each damaged one was,
    for the caller to tell; None: they are warned of here. Every rank of `group` must call. Raises CheckpointError if
    there are checkpoints, but no valid one.
    """
    directory = run_dir / CHECKPOINTS
    names = first = _names(directory, before, group)
    damaged: dict[str, str] = {}
    while left := [name for name in names if name not in damaged]:
        name, reader = left[0], None
        try:
            with together(group):
                reader = CheckpointReader(directory / name)
            if load is not None:
                load(reader)
            else:
                with together(group):
                    reader.verify_files()
            return reader
        except DamagedCheckpoint as error:
            reason = str(error).replace(REMEDY, "")
        if reader is not None:
            reader.close()
        names = _names(directory, before, group)
        if name not in names:
            continue
        damaged[name] = reason
        if passed_over is not None:
            passed_over[step_of(Path(name))] = reason
        elif rank_of(group) == 0:
            logger.warning("SKIPPING DAMAGED CHECKPOINT %s: %s", name, reason)
    if damaged:
        raise CheckpointError(
            f"{directory}: none of its {len(damaged)} checkpoints is valid ({next(iter(damaged.values()))}); "
            "restore one from a copy, or begin anew by megalm train --fresh"
        )
    if first:
        raise CheckpointError(f"{directory}: all its checkpoints went away while they were read; see who deletes them")
    return None


def _names(directory: Path, before: Sequence[int], group: Group) -> list[str]:
    """Return the names of a run's checkpoints in the order in which `latest_checkpoint` tries them; all ranks call."""
    names: list[str] = []
    with together(group):
        if rank_of(group) == 0:
            paths = find_checkpoints(directory)
            paths.sort(key=lambda path: [*(step_of(path) < step for step in before), True].index(True))
            names = [path.name for path in paths]
    return broadcast_json(names, group)


class CheckpointManager:
    """Saves a run's checkpoints, keeps those that are to stay, and finds the one to resume from.

    One save at a time: each method that reads or changes checkpoints first waits for the one that is on its way.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int | Keep,
        group: Group = None,
        layout: Mapping[str, Any] | None = None,
        files: FileSystem | None = None,
        meeting: Meeting | None = None,
        saved: Callable[[], None] | None = None,
    ) -> None:
        """Clear what interrupted saves left (rank 0). Every rank of `group` must call (None: alone).

        `layout` (sizes of the mesh axes, ZeRO stage, ...) is noted in each checkpoint for people to read. `meeting` is
        what a thread beside the main one uses where `group` has several ranks. `saved` is called on rank 0 once a
        checkpoint stands, perhaps in that thread. Raises CheckpointError on all ranks.
        """
        self.keep = Keep(keep) if isinstance(keep, int) else keep
        if self.keep.last < 1:
            raise CheckpointError(f"checkpoint.keep={self.keep.last} would keep no checkpoint; use 1 or more")
        self.run_dir = run_dir
        self.directory = run_dir / CHECKPOINTS
        self.passed_over: dict[int, str] = {}
        """By step, why the last `latest` passed over damaged checkpoints, in the order in which they were tried."""
        self._damaged: set[int] = set()  # all that were passed over and are still there
        self._group, self._layout, self._files = group, layout, files or FileSystem()
        self._meeting, self._saved = meeting, saved
        self._snapshot = Snapshot()
        self._flight: Flight | None = None
        self._metrics: dict[int, float] = {}
        self._was_there = False
        with together(group):
            if rank_of(group) == 0:
                self._clear()
                self._was_there = run_dir.is_dir()
                for path in find_checkpoints(self.directory) if self.keep.best is not None else ():
                    self._note_metric(step_of(path), stored_metric(path, self.keep.best or ""))

    def save(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, then delete what is not to stay; see `write_checkpoint`."""
        self.wait()
        path, _ = self._write(step, fragments, state, self._group)
        return path

    def save_patiently(self, step: int, fragments: Callable[[], Iterable[Fragment]], state: Mapping[str, Any]) -> Saved:
        """Do what `save` does, several times where a disk refuses, and return how it ended. Every rank calls."""
        self.wait()
        write = lambda: self._write(step, fragments(), state, self._group)  # noqa: E731
        return try_to_save(step, self._path(step), write, tells=rank_of(self._group) == 0)

    def begin(self, step: int, fragments: Iterable[Fragment], state: Mapping[str, Any]) -> None:
        """Copy the fragments and begin to write the copies in a thread; every rank calls, once `wait` has returned.

        On CUDA `settle` must be called before the tensors change. Raises OutOfMemory on all ranks, and has begun
        nothing, where one's host has no room for the copy.
        """
        assert self._flight is None, f"the save of step {self._flight and self._flight.step} has not been waited for"
        group = self._meeting if size_of(self._group) > 1 else None
        assert group is not None or size_of(self._group) == 1, "several ranks save in threads by a meeting alone"
        try:
            with together(self._group):
                copies, text = self._snapshot.take(fragments), json.loads(encode_state(state))
        except OutOfMemory:
            self._snapshot = Snapshot()
            raise

        def work() -> Saved:
            try:
                self._snapshot.ready()
            except Exception as error:
                return Saved(step, self._path(step), error)
            write = lambda: self._write(step, copies, text, group)  # noqa: E731
            return try_to_save(step, self._path(step), write, tells=rank_of(group) == 0)

        self._flight = Flight(step, work, group)

    def settle(self) -> None:
        """Have the device's further work wait until the copies of `begin` are made."""
        self._snapshot.settle()

    def ended(self) -> Saved | None:
        """Return how the save on its way has ended; None where there is none, or it goes on. Forgets nothing."""
        return None if self._flight is None else self._flight.result()

    def quiet_s(self) -> float:
        """Return for how long the save on its way, if any, has written nothing on this rank."""
        return 0.0 if self._flight is None or self._flight.result() is not None else self._flight.quiet_s()

    def wait(self) -> Saved | None:
        """Wait for the save that is on its way and return how it, or the last one, ended; None where none began.

        The main thread of every rank calls; the answer is the same on all.
        """
        return None if self._flight is None else self._flight.wait()

    def taken(self) -> None:
        """Forget how the last save ended, once somebody knows."""
        self._flight = None

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Let a save that is on its way end, after an error too; leave it once it has written nothing for some seconds.

        What becomes of it is logged, as whoever would ask is gone.
        """
        if self._flight is None:
            return
        if self._flight.result() is None:
            logger.info("the checkpoint of step %d is on its way, which is waited for", self._flight.step)
        saved = self._flight.wait(patience_s)
        if saved is None or saved.error is not None:
            self._flight.give_up()
            reason = "it does not go on" if saved is None else saved.error
            logger.warning("%s: was not saved: %s", self._path(self._flight.step), reason)
        self._flight = None

    def latest(self, load: Load | None = None, before: Sequence[int] = ()) -> CheckpointReader | None:
        """Return the newest checkpoint that `load` finds whole, the same on all ranks. See `latest_checkpoint`."""
        self.wait()
        self.passed_over.clear()
        reader = latest_checkpoint(self.run_dir, load, self._group, before, self.passed_over)
        self._damaged |= self.passed_over.keys()
        return reader

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps than `step`, to which the run went back. Raises CheckpointError."""
        self.wait()
        with together(self._group):
            if rank_of(self._group) == 0:
                try:
                    for path in find_checkpoints(self.directory):
                        if step_of(path) > step:
                            self._delete(path)
                except OSError as error:
                    raise storage_error(error, self.directory) from error

    def _path(self, step: int) -> Path:
        return self.directory / checkpoint_name(step)

    def _write(
        self, step: int, fragments: Iterable[Fragment], state: Mapping[str, Any], group: Group | Meeting
    ) -> tuple[Path, int]:
        """Write once, and then delete what is not to stay. In the thread of a flight, or in the main one."""
        with together(group):
            if rank_of(group) == 0 and self._was_there:
                try:
                    self._files.require_directory(self.run_dir)  # made anew, it might fill the disk below a lost mount
                except OSError as error:
                    raise storage_error(error, self.run_dir) from error
        found = write_and_count(self.directory, step, fragments, state, group, self._layout, self._files)
        if rank_of(group) == 0:
            self._was_there = True
            self._damaged.discard(step)
            if self._saved is not None:
                self._saved()
            self._note_metric(step, metric_of(state, self.keep.best))
            self._retain(step)
        return found

    def _note_metric(self, step: int, value: float | None) -> None:
        self._metrics.pop(step, None)
        if value is not None:
            self._metrics[step] = value

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint such that a kill leaves it whole or hidden."""
        deleted = hidden(path, "deleted")
        self._files.remove_tree(deleted)
        self._files.rename(path, deleted)
        self._metrics.pop(step_of(path), None)
        self._damaged.discard(step_of(path))
        self._files.sync_directory(self.directory)
        self._files.remove_tree(deleted)

    def _retain(self, step: int) -> None:
        """Delete the checkpoints that are not to stay, now that one of `step` is whole.

        Those that `latest` passed over as damaged never count. They are deleted once a newer one is whole: until then,
        as those of later steps, which are all of that sort, they may be all that there is to restore.
        """
        try:
            named = [path for path in find_checkpoints(self.directory) if CHECKPOINT_NAME.fullmatch(path.name)]
            earlier = {step_of(path): path for path in named if step_of(path) <= step}
            damaged = self._damaged & earlier.keys()
            for old in [*superfluous(earlier.keys() - damaged, self.keep, self._metrics), *sorted(damaged)]:
                self._delete(earlier[old])
        except (OSError, CheckpointError) as error:
            where, why = (
                (error.filename or self.directory, error.strerror) if isinstance(error, OSError) else ("", error)
            )
            logger.warning("%s: cannot delete an old checkpoint: %s", where or self.directory, why)

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
