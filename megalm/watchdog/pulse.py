"""What a rank tells its watcher process: a few numbers in shared memory, written several times a second. No torch.

The memory is anonymous and both sides hold its descriptor. A change of the version number while it is read, or an odd
one, tells the reader to read again.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections.abc import Mapping
from typing import Any

_SIZE = 1 << 16
_MARK = struct.Struct("<QQ")  # step, phase
_HEADER = struct.Struct("<QdI")  # version, time of writing (CLOCK_MONOTONIC, the same for all processes), length
_TEXT = _MARK.size + _HEADER.size


class Pulse:
    """A record that one process writes and another reads, and a mark that stands beside it at once."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Make the memory, or open that of a descriptor which was handed down."""
        if descriptor is None:
            descriptor = os.memfd_create("megalm-pulse")
            os.ftruncate(descriptor, _SIZE)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._version = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record, which is JSON of at most 64 KiB."""
        text = json.dumps(record, separators=(",", ":")).encode()
        assert len(text) <= _SIZE - _TEXT, f"a record of {len(text)} bytes"
        _HEADER.pack_into(self._memory, _MARK.size, self._version + 1, 0.0, 0)
        self._memory[_TEXT : _TEXT + len(text)] = text
        self._version += 2
        _HEADER.pack_into(self._memory, _MARK.size, self._version, time.monotonic(), len(text))

    def mark(self, step: int, phase: int) -> None:
        """Replace the mark; costs about a microsecond."""
        _MARK.pack_into(self._memory, 0, step, phase)

    def read(self) -> tuple[float, dict[str, Any]]:
        """Return the time of the last writing and the record, the mark in it as "step" and "phase"; (0, {}) before."""
        for _ in range(100):
            step, phase = _MARK.unpack_from(self._memory)
            version, written, length = _HEADER.unpack_from(self._memory, _MARK.size)
            text = self._memory[_TEXT : _TEXT + length]
            if version % 2 == 0 and version == _HEADER.unpack_from(self._memory, _MARK.size)[0]:
                return (written, {**json.loads(text), "step": step, "phase": phase}) if length else (0.0, {})
            time.sleep(0.001)
        return 0.0, {}
