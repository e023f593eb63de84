"""`metrics.jsonl` of a run: one JSON object a line, on disks that fill up and behind processes that are killed.

Owns the file's format. Only rank 0 has one.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.files import json_number, refused_write, write_durably
from megalm.train.sinks import Record

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_WAITING_BYTES = 64 << 20
Event = Mapping[str, str | float | int]
"""Something that happened at a step: "step", "event" (what), and what there is to say of it."""


def _kind(record: Mapping[str, object]) -> str:
    return "event" if "event" in record else "evaluate" if "evaluate/loss" in record else "train"


def _encode(record: Record | Event) -> str:
    """Return one line of valid JSON; NaN and infinities become strings, which `float()` reads."""
    values = {key: json_number(value) if isinstance(value, float) else value for key, value in record.items()}
    return json.dumps(values, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the figures of a `metrics.jsonl`, non-finite values as floats; events and a torn last line are left out.

    Raises OSError when the file cannot be read.
    """
    return [
        {key: float(value) if isinstance(value, str) else value for key, value in record.items()}
        for _, record in _complete_lines(path)
        if _kind(record) != "event"
    ]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a `metrics.jsonl`, by step. Raises OSError when the file cannot be read."""
    return [record for _, record in _complete_lines(path) if _kind(record) == "event"]


def _complete_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return each complete line with its object; what a crash left (torn, NUL-filled) is dropped aloud."""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError:
            logger.warning("%s:%d is not a complete line of metrics and is left out", path, number)
            continue
        lines.append((line, record))
    return lines


class MetricsFile:
    """`metrics.jsonl` of a run: one JSON object a line, appended and flushed line by line.

    A line's `step` counts the steps done. Opening at `resume_step` first drops, atomically, the lines of
    later steps, which are about to be done again, so each step stands there once, and once more where it was
    evaluated. Events stay: they did happen, and may happen again. Raises StorageError.

    A disk that takes no lines is no reason to end a run: they wait in memory, in their order, until it does.
    """

    def __init__(self, run_dir: Path, resume_step: int, name: str = METRICS_FILE) -> None:
        self.path = run_dir / name
        self._last: dict[str, int] = {}
        try:
            if self.path.exists():
                self._drop_after(resume_step)
            self._stream = self._append()
        except OSError as error:
            raise refused_write(error, self.path) from error

    def _append(self) -> io.FileIO:
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._lost = 0
        self._refused = False
        return io.FileIO(self.path, "a")

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which are about to be done again."""
        self.close()
        self._last.clear()
        try:
            self._drop_after(step)
        except OSError as error:
            logger.warning("%s: cannot be written: %s; steps after %d will stand there twice", self.path, error, step)
        self._stream = self._append()
        if self.path.read_bytes()[-1:] not in (b"", b"\n"):  # a line that is torn
            self._waiting.append(b"\n")
            self._waiting_bytes += 1

    def _drop_after(self, step: int) -> None:
        """Drop lines whole or not at all; where a full disk has no room for that, in place."""
        lines = _complete_lines(self.path)
        kept = [(line, record) for line, record in lines if record["step"] <= step or _kind(record) == "event"]
        for _, record in kept:
            self._last[_kind(record)] = int(record["step"])  # of events nobody asks
        content = "".join(f"{line}\n" for line, _ in kept).encode()
        if content != self.path.read_bytes():
            try:
                write_durably(self.path, content)
            except OSError as error:
                logger.warning("%s: cannot be replaced: %s; its later lines are cut off in place", self.path, error)
                both = zip(self.path.read_bytes(), content, strict=False)
                same = next((at for at, (old, new) in enumerate(both) if old != new), len(content))
                with self.path.open("r+b") as stream:
                    stream.seek(same)
                    stream.write(content[same:])
                    stream.truncate()

    def write(self, record: Record | Event) -> bool:
        """Append one line and return True; False: its step stands there already (a finished run, evaluated again)."""
        kind, step = _kind(record), int(record["step"])
        if kind != "event" and step <= self._last.get(kind, -1):
            return False
        self._last[kind] = step
        line = (_encode(record) + "\n").encode()
        if self._waiting_bytes + len(line) <= _WAITING_BYTES:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
        else:
            self._lost += 1
        self._write_waiting()
        return True

    def _write_waiting(self) -> None:
        """Write what waits, as far as the disk takes it; the rest of a line that is torn comes first the next time."""
        try:
            while self._waiting:
                count = self._stream.write(self._waiting[0])
                self._waiting_bytes -= count
                if rest := self._waiting[0][count:]:
                    self._waiting[0] = rest
                else:
                    self._waiting.popleft()
        except OSError as error:
            if not self._refused:
                logger.warning("%s: cannot write: %s; lines of metrics wait in memory", self.path, error.strerror)
            self._refused = True
        else:
            if self._refused:
                lost = f", but for {self._lost} that were too many" if self._lost else ""
                logger.warning("%s: the disk takes lines again, those that waited are written%s", self.path, lost)
            self._refused, self._lost = False, 0

    def close(self) -> None:
        """Bring the lines to the disk and close the file. Says so where the disk does not take them."""
        if self._stream.closed:
            return
        self._write_waiting()
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            logger.error("%s: cannot write: %s; lines of metrics may be lost", self.path, error.strerror)
        if self._waiting:
            lost = len(self._waiting) + self._lost
            logger.error("%s: %d lines of metrics are lost, as the disk takes no more", self.path, lost)
        self._stream.close()
