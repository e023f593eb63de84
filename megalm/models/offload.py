"""Activations that wait in the host's memory for their backward pass, all that autograd keeps of each block.

A block's leave when the block is done, while the next one computes, and come back when the backward pass of the block
behind it begins (Rhu et al. 2016, vDNN; for Transformers Ren et al. 2021). With recomputation what is kept is less: of
a whole block its input alone. What moves them is a `Mover`, so that the meta device counts and tests watch the same
steps that CUDA makes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 2**18
"""Bytes below which a storage stays: at 25 GB/s (PCIe 4) they travel for 10 us, as long as it takes to start a copy."""


class Mover(Protocol):
    """Copies between the device and the host, which may go on behind the calls until `wait` for what they return.

    Every `flat` is a whole storage as a tensor of one dim. What is computed next may free or overwrite it only after
    a `wait`, or after `release`.
    """

    def moves(self, x: Tensor) -> bool:
        """Return whether a tensor lies on the device."""

    def to_host(self, flats: Sequence[Tensor]) -> tuple[list[Any], Any]:
        """Begin to copy; return the copies and what to wait for."""

    def to_device(self, copies: Sequence[Any]) -> tuple[list[Tensor], Any]:
        """Begin to copy back; return the tensors and what to wait for."""

    def wait(self, event: Any) -> None:
        """Let all that is computed from now on come after those copies."""

    def release(self, flats: Sequence[Tensor]) -> None:
        """Let memory that is being copied to the host be used again only after that, whoever frees it."""


class CudaMover:
    """Copies through pinned memory on two streams, as a link carries both directions at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def moves(self, x: Tensor) -> bool:
        """Return whether a tensor lies on a GPU."""
        return x.is_cuda

    def to_host(self, flats: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copy behind what has been launched so far, which makes the tensors."""
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            copies = [_pinned_like(flat) for flat in flats]
            for copy, flat in zip(copies, flats, strict=True):
                copy.copy_(flat, non_blocking=True)
            return copies, self._out.record_event()

    def to_device(self, copies: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copy into memory of the computing stream, which frees it too, behind what may still be using it.

        The allocator of pinned memory keeps a copy that is let go until the stream has read it.
        """
        flats = [torch.empty(copy.shape, dtype=copy.dtype, device=self.device) for copy in copies]
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._back):
            for flat, copy in zip(flats, copies, strict=True):
                flat.copy_(copy, non_blocking=True)
            return flats, self._back.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """Have the computing stream wait; the host does not."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def release(self, flats: Sequence[Tensor]) -> None:
        """Tell the allocator which stream reads them."""
        for flat in flats:
            flat.record_stream(self._out)


def _pinned_like(flat: Tensor) -> Tensor:
    """Return pinned memory, of which CUDA's own error would not say what it was for."""
    try:
        return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    except RuntimeError as error:
        raise MemoryError(f"{flat.nbytes} bytes of pinned host memory for activations: {error}") from error


class MetaMover:
    """Moves shapes: a copy in the host is no tensor, and what comes back is a new one."""

    def moves(self, x: Tensor) -> bool:
        """Return whether a tensor is one of shapes alone."""
        return x.is_meta

    def to_host(self, flats: Sequence[Tensor]) -> tuple[list[tuple[int, torch.dtype]], None]:
        """Return sizes."""
        return [(flat.numel(), flat.dtype) for flat in flats], None

    def to_device(self, copies: Sequence[tuple[int, torch.dtype]]) -> tuple[list[Tensor], None]:
        """Return tensors of these sizes."""
        return [torch.empty(size, dtype=dtype, device="meta") for size, dtype in copies], None

    def wait(self, event: None) -> None:
        """Nothing is under way."""

    def release(self, flats: Sequence[Tensor]) -> None:
        """Nothing is under way."""


def mover_of(device: torch.device) -> Mover:
    """Return what moves tensors of a device that is not the host itself."""
    assert device.type in ("cuda", "meta"), f"activations on {device.type} are in the host's memory already"
    return CudaMover(device) if device.type == "cuda" else MetaMover()


class HostBytes:
    """How much lies in the host's memory, and the most that ever did."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, size: int) -> None:
        """Count bytes that came, or went where negative."""
        self.now += size
        self.peak = max(self.peak, self.now)


class _Copy:
    """A copy in the host's memory, counted for as long as it is there."""

    def __init__(self, data: Any, size: int, count: HostBytes) -> None:
        self.data = data
        count.add(size)
        weakref.finalize(self, count.add, -size).atexit = False


@dataclass(eq=False)
class _Kept:
    """A storage that autograd keeps: on the device, in the host's memory, or on its way."""

    flat: Tensor | None
    copy: _Copy | None = None


@dataclass(eq=False)
class _Block:
    """What one forward pass of a block keeps; only autograd holds it, once it is no more on its way."""

    before: _Block | None
    """The block whose backward pass is next."""
    kept: list[weakref.ref[_Kept]] = field(default_factory=list)
    needed: bool = False
    """Its backward pass has begun, or is the next to begin."""


class _Saved:
    """What autograd is given in place of a tensor: the storage, and which part of it the tensor is."""

    def __init__(self, kept: _Kept, block: _Block, x: Tensor) -> None:
        self.kept, self.block, self.dtype = kept, block, x.dtype
        self.place = x.shape, x.stride(), x.storage_offset()


@dataclass(eq=False)
class _Leaving:
    """A block's storages on their way to the host, and when they left."""

    block: _Block
    kept: list[_Kept]
    event: Any
    since: int


class Offload:
    """Runs blocks so that what autograd keeps of them lies in the host's memory until their backward pass.

    Parameters, tensors that `lasting` names (they are there anyway), leaves and storages of less than `small` bytes
    stay. At most one block is on its way to the host while another computes: a device that computes faster than
    copies go waits for them, instead of filling its memory.
    """

    def __init__(self, mover: Mover, lasting: Iterable[Tensor] = (), small: int | None = None) -> None:
        self.host_bytes = HostBytes()
        self._mover = mover
        self._lasting = {_key(x) for x in lasting}
        self._small = SMALL if small is None else small
        self._begun = 0
        self._before: _Block | None = None
        self._leaving: deque[_Leaving] = deque()
        self._coming: tuple[list[Tensor], Any] | None = None

    def begin(self) -> None:
        """Begin a forward pass: the next block is its first."""
        self._before = None

    def run(self, compute: Callable[[], Tensor], owner: nn.Module, x: Tensor) -> Tensor:
        """Return what a block, `compute`, makes of x; `owner` has its parameters."""
        self._begin_block()
        block, kept = _Block(self._before), dict[int, _Kept]()
        lasting = self._lasting | ({_key(x)} if x.is_leaf and x.requires_grad else set())
        pack = partial(self._pack, block=block, kept=kept, parameters=list(owner.parameters()), lasting=lasting)
        with saved_tensors_hooks(pack, self._unpack):
            y = compute()
        if kept:
            y.register_hook(partial(self._begin_backward, block))
            self._send(block, list(kept.values()))
            self._before = block
        return y

    def _pack(
        self, x: Tensor, block: _Block, kept: dict[int, _Kept], parameters: list[nn.Parameter], lasting: set[int]
    ) -> Tensor | _Saved:
        key = _key(x)
        if key not in kept:
            stays = not self._mover.moves(x) or x.untyped_storage().nbytes() < self._small or key in lasting
            # ZeRO 3 gives parameters other storages within the block.
            if stays or any(_key(p) == key for p in parameters):
                return x if x.is_leaf else x.detach()  # with its place in the graph it would keep itself alive
            kept[key] = _Kept(_whole_storage(x))
        return _Saved(kept[key], block, x)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.kept.flat is None:  # who reads it does not wait for the backward pass
            self._bring(saved.block)
            self._arrive()
        assert saved.kept.flat is not None, "a storage is on the device or comes back with its block"
        return saved.kept.flat.view(saved.dtype).as_strided(*saved.place)

    def _send(self, block: _Block, kept: list[_Kept]) -> None:
        flats = [storage.flat for storage in kept if storage.flat is not None]
        copies, event = self._mover.to_host(flats)
        for storage, flat, data in zip(kept, flats, copies, strict=True):
            storage.copy = _Copy(data, flat.nbytes, self.host_bytes)
        block.kept = [weakref.ref(storage) for storage in kept]
        self._leaving.append(_Leaving(block, kept, event, self._begun))

    def _begin_block(self) -> None:
        """Free on the device what left before the last block began, once it has arrived."""
        self._begun += 1
        while self._leaving and self._leaving[0].since < self._begun - 1:
            gone = self._leaving.popleft()
            self._mover.wait(gone.event)
            for storage in gone.kept:
                storage.flat = None

    def _begin_backward(self, block: _Block, _: Tensor) -> None:
        """Have this block's storages here, and those of the block before it on their way."""
        needed = [block, *([] if block.before is None else [block.before])]
        for each in needed:
            self._keep(each)
        self._begin_block()
        self._bring(block)
        self._arrive()
        for before in needed[1:]:
            self._bring(before)

    def _keep(self, block: _Block) -> None:
        """Keep on the device what is still there of a block, whose copies were made for nothing."""
        for leaving in self._leaving:
            if leaving.block is block:
                self._mover.release([storage.flat for storage in leaving.kept if storage.flat is not None])
                for storage in leaving.kept:
                    storage.copy = None
                block.needed = True
                self._leaving.remove(leaving)
                return

    def _bring(self, block: _Block) -> None:
        """Begin to bring a block's storages back."""
        self._keep(block)
        if block.needed:
            return
        block.needed = True
        self._arrive()
        kept = [storage for storage in (reference() for reference in block.kept) if storage is not None]
        copies = [storage.copy.data for storage in kept if storage.copy is not None]
        self._coming = self._mover.to_device(copies)
        for storage, flat in zip(kept, self._coming[0], strict=True):
            storage.flat, storage.copy = flat, None

    def _arrive(self) -> None:
        """Have what is computed next wait for what comes back, which nobody may free before."""
        if self._coming is not None:
            self._mover.wait(self._coming[1])
            self._coming = None


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _whole_storage(x: Tensor) -> Tensor:
    return x.detach().as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
