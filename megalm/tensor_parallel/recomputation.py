"""Inputs of linear layers that the backward pass makes again instead of keeping them (Korthikanti et al. 2022).

A product keeps its input for the gradient of its weight. Where that input is cheap to make of a tensor that is kept
anyway, gathered over tokens (section 4.2.2) or by a norm or an activation function, it need not be there in between.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

Make = Callable[[Tensor], Tensor]


class Origin:
    """How an input is made again: of what a node of autograd's graph has saved, whose backward comes after its users'.

    The node and not a tensor, so that what is saved may wait elsewhere (`megalm.models.offload`) until then.
    """

    def __init__(self, make: Make, node: Any) -> None:
        self._make, self._node = make, node
        self._users = 0
        self._made: Tensor | None = None

    def then(self, make: Make) -> Origin:
        """Return the origin of what `make` makes of this input. Collectives in it run in the backward pass too."""
        return Origin(lambda source: make(self._make(source)), self._node)

    def promise(self) -> None:
        """Count one more that will ask for the input."""
        self._users += 1

    def again(self) -> Tensor:
        """Return the input as it was, made once for all who were promised it."""
        made = self._made
        if made is None:
            (source,) = self._node.saved_tensors
            with torch.no_grad():
                made = self._make(source)
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made


def unchanged(x: Tensor) -> Tensor:
    """Return x: an input that is kept itself, though not what is gathered of it."""
    return x


def remember(x: Tensor, source: Tensor, make: Make) -> tuple[Tensor, Origin | None]:
    """Return x, which is `make(source)` bit for bit, and its origin; None where x needs no gradient.

    `source` should be what the backward pass behind x keeps, else it is kept for this alone.
    """
    if not x.requires_grad:
        return x, None
    x = _Remember.apply(x, source.detach())
    return x, Origin(make, x.grad_fn)


def made_again(x: Tensor, origin: Origin | None) -> AbstractContextManager[Any]:
    """Return a context in which autograd does not keep x, an input of products, but makes it again by its origin.

    Without an origin it does nothing. Views of x are views of what is made.
    """
    if origin is None:
        return nullcontext()
    storage = x.untyped_storage()
    return saved_tensors_hooks(partial(_pack, origin=origin, key=storage._cdata, size=storage.nbytes()), _unpack)


class _Saved:
    """What autograd is given in place of an input: its origin, and which part of its storage is wanted."""

    def __init__(self, origin: Origin, size: int, x: Tensor) -> None:
        self.origin, self.size = origin, size
        self.place = x.shape, x.stride(), x.storage_offset()
        origin.promise()


def _pack(x: Tensor, origin: Origin, key: int, size: int) -> Tensor | _Saved:
    if x.untyped_storage()._cdata == key:
        return _Saved(origin, size, x)
    return x if x.is_leaf else x.detach()  # a weight, of which views would keep their place in the graph alive


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    made = saved.origin.again()
    size = made.untyped_storage().nbytes()
    assert size == saved.size, f"an input of {saved.size} bytes is made again with {size}"
    return made.as_strided(*saved.place)


class _Remember(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
