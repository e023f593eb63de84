"""A copy of what a rank saves, in the host's memory: training goes on while it is written.

Owns: the buffers, which stay from one snapshot to the next, so that memory is bounded by one of them and is mapped
once; whether the host has room for them; and the copy's order with training, on CUDA by events. Who writes the copy is
`background.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from megalm.distributed.host_memory import free_host_bytes
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError, OutOfMemory

RESERVE_BYTES = 512 << 20
"""Of the host's memory, which a snapshot leaves to others."""
_ASKED_BYTES = 1 << 20  # a smaller buffer is not worth the question

_Key = tuple[str, str, int, int, int | None]


class Snapshot:
    """The fragments of one save in buffers of the host; of one save at a time.

    On a CPU `take` returns with the copy made. On CUDA the copy goes to page-locked buffers (which torch rounds up to
    powers of two) on a stream of its own: `settle` must be called before the tensors change, and `ready` before the
    buffers are read.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Key, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def bytes(self) -> int:
        """The memory that the buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    @torch.no_grad()
    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Return copies of all fragments, which hold until the next call; of the last call's none may be in use.

        Raises OutOfMemory, with all buffers let go, where the host has no room for them.
        """
        copies: dict[_Key, Fragment] = {}
        before, self._buffers = self._buffers, {}
        for fragment in fragments:
            shard, values = fragment.shard, fragment.values.detach()
            key = (shard.name, fragment.kind, shard.start, fragment.start, shard.first_expert)
            if key in copies:
                raise CheckpointError(f"fragment {key} was given twice by one rank; correct the caller")
            buffer = before.pop(key, None)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                del buffer  # before another one is taken
                buffer = self._new(values)
            with self._beside(values):
                buffer.copy_(values, non_blocking=values.is_cuda)
            if self._stream is not None and values.is_cuda:
                values.record_stream(self._stream)  # what was made for this save may be freed before it is copied
            self._buffers[key] = buffer
            copies[key] = replace(fragment, values=buffer)
        if self._stream is not None:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(self._stream)
        return list(copies.values())

    def _new(self, values: Tensor) -> Tensor:
        needed = values.numel() * values.element_size()
        needed = 1 << (needed - 1).bit_length() if values.is_cuda and needed else needed
        try:
            if needed >= _ASKED_BYTES and (free := free_host_bytes()) < needed + RESERVE_BYTES:
                raise RuntimeError(f"{free >> 20} MiB are free")
            return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        except RuntimeError as error:
            taken, self._buffers = self.bytes, {}
            raise OutOfMemory(
                f"the host's memory has no room for a copy of what is saved: {error}, {taken >> 20} MiB are copied"
            ) from error

    def settle(self) -> None:
        """Have the device's further work wait for the copy; the host does not. Costs nothing where none is made."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def ready(self) -> None:
        """Return when the copy is made. For any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _beside(self, values: Tensor) -> AbstractContextManager[object]:
        """Return what a copy is made in: on CUDA the other stream, behind the work that made the values."""
        if not values.is_cuda:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(values.device)
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        return torch.cuda.stream(self._stream)
