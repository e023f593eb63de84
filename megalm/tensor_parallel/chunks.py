"""Tokens of a tensor-parallel layer in chunks, so that one is sent while another is multiplied.

A chunk is a range of rows, the flattened batch and tokens, of every rank alike: products do not ask for the order of
their rows. Autograd runs nodes in the reverse order of their making, so that each chunk's nodes, made beside its
product, have the same overlap in the backward pass: a chunk's gradient is on its way before the product of the chunk
before it begins.

    forward    column  [enter: start all] -> [arrive: wait for i] -> product i -> ...
               row     product i -> [depart: start i] -> ... -> [join: wait for all]
    backward   column  [enter: wait for all] <- [arrive: start i] <- product i
               row     product i <- [depart: wait for i] <- [join: start all, the last first]

Every rank of the group must call, forward and backward: all start the same collectives in the same order. What is on
its way is no value yet, and goes through none but the nodes of this module until it has been waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.tensor_parallel.recomputation import Origin


@dataclass
class Arrival:
    """A collective's result, which is there once it has been waited for; no `work`: it is there.

    What is sent is kept until then.
    """

    result: Tensor
    work: dist.Work | None = None
    sent: Tensor | None = None

    def wait(self) -> Tensor:
        """Return the result."""
        if self.work is not None:
            self.work.wait()
            self.work = self.sent = None
        return self.result


Start = Callable[[Tensor, dist.ProcessGroup], Arrival]
"""Starts a collective of rows [n, D], and does not wait for it."""


def start_nothing(x_ND: Tensor, group: dist.ProcessGroup) -> Arrival:
    """Give the rows themselves."""
    return Arrival(x_ND)


def start_sum(x_ND: Tensor, group: dist.ProcessGroup) -> Arrival:
    """Sum rows over the group."""
    result = x_ND.clone(memory_format=torch.contiguous_format)
    return Arrival(result, dist.all_reduce(result, group=group, async_op=True))


def start_gather(x_ND: Tensor, group: dist.ProcessGroup) -> Arrival:
    """Join the ranks' rows, rank after rank."""
    result = x_ND.new_empty((group.size() * len(x_ND), *x_ND.shape[1:]))
    sent = x_ND.contiguous()
    return Arrival(result, dist.all_gather_into_tensor(result, sent, group=group, async_op=True), sent)


def start_scatter(x_ND: Tensor, group: dist.ProcessGroup) -> Arrival:
    """Sum rows over the group and keep this rank's, of those of all ranks one after the other."""
    result = x_ND.new_empty((len(x_ND) // group.size(), *x_ND.shape[1:]))
    sent = x_ND.contiguous()
    return Arrival(result, dist.reduce_scatter_tensor(result, sent, group=group, async_op=True), sent)


def chunk_sizes(rows: int, chunks: int) -> list[int]:
    """Return the rows of each chunk: as equal as may be, none of them empty."""
    chunks = max(1, min(chunks, rows))
    return [rows // chunks + (index < rows % chunks) for index in range(chunks)]


def entering(
    x: Tensor, origin: Origin | None, group: dist.ProcessGroup, sequence: bool, chunks: int
) -> Iterator[tuple[Tensor, Origin | None]]:
    """Yield a column-parallel layer's input by chunks of rows, each with its origin if x has one.

    x_BTD, or with `sequence` x_BTtD, of whose tokens those of all ranks are gathered. The product of a chunk is to be
    made before the next one is asked for. The backward pass sums the chunks' gradients over `group`.
    """
    x_ND = x.flatten(0, 1)
    sizes = chunk_sizes(len(x_ND), chunks)
    way = _Way(group, *((start_gather, start_scatter) if sequence else (start_nothing, start_sum)), sizes)
    for index, chunk in enumerate(_Enter.apply(x_ND, way)):
        part: Tensor = _Arrive.apply(chunk, way, index)
        yield part, origin if origin is None or not sequence else origin.then(partial(_gathered, way, index))


def _gathered(way: _Way, index: int, x: Tensor) -> Tensor:
    """Return a chunk's rows of all ranks, from this rank's tokens."""
    return start_gather(x.flatten(0, 1).split(way.sizes)[index], way.group).wait()


def entered(products: Sequence[Tensor], x: Tensor, group: dist.ProcessGroup, sequence: bool) -> Tensor:
    """Return the products of the chunks of `entering(x)` in the order of the tokens: y_BTF."""
    if not sequence:
        return torch.cat(tuple(products)).unflatten(0, x.shape[:2])
    y_RNF = torch.cat([product.unflatten(0, (group.size(), -1)) for product in products], dim=1)
    return y_RNF.unflatten(1, x.shape[:2]).transpose(0, 1).flatten(1, 2)


def leaving(
    x: Tensor, group: dist.ProcessGroup, sequence: bool, chunks: int, product: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `product` of a row-parallel layer's input, summed over `group`, by chunks of rows.

    x_BTF -> y_BTD, or with `sequence` this rank's tokens y_BTtD.
    """
    ranks = group.size() if sequence else 1
    batch, tokens = x.shape[0], x.shape[1] // ranks
    assert tokens * ranks == x.shape[1], f"{x.shape[1]} tokens do not divide over a group of {ranks}"
    x_RNF = x.unflatten(1, (ranks, tokens)).transpose(0, 1).flatten(1, 2)
    sizes = chunk_sizes(batch * tokens, chunks)
    way = _Way(group, *((start_scatter, start_gather) if sequence else (start_sum, start_nothing)), sizes)
    under_way = []
    for index, chunk in enumerate(x_RNF.split(sizes, dim=1)):
        under_way.append(_Depart.apply(product(chunk.flatten(0, 1)), way, index))
    y: Tensor = _Join.apply(way, *under_way)
    return y.unflatten(0, (batch, tokens))


class _Way:
    """The collectives of one layer's chunks in one pass forward and one backward."""

    def __init__(self, group: dist.ProcessGroup, forward: Start, backward: Start, sizes: list[int]) -> None:
        self.group, self.forward, self.backward, self.sizes = group, forward, backward, sizes
        self.sent: dict[int, Arrival] = {}
        self.returned: dict[int, Arrival] = {}

    def all_of(self, arrivals: dict[int, Arrival]) -> Tensor:
        """Wait for all chunks and return their rows, one chunk behind the other."""
        return torch.cat([arrivals.pop(index).wait() for index in range(len(self.sizes))])


def _stand_in(x: Tensor) -> Tensor:
    """Return what goes through the graph in the place of a tensor that is on its way: its shape without its memory."""
    return x.new_empty(()).expand(x.shape)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, way: _Way) -> tuple[Tensor, ...]:
        ctx.way = way
        for index, chunk in enumerate(x_ND.split(way.sizes)):
            way.sent[index] = way.forward(chunk, way.group)
        return tuple(arrival.result.detach() for arrival in way.sent.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *on_their_way: Tensor) -> tuple[Tensor, None]:
        return ctx.way.all_of(ctx.way.returned), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Tensor, way: _Way, index: int) -> Tensor:
        ctx.way, ctx.index = way, index
        way.sent.pop(index).wait()
        return chunk.view_as(chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        way: _Way = ctx.way
        way.returned[ctx.index] = way.backward(gradient, way.group)
        return _stand_in(gradient), None, None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, way: _Way, index: int) -> Tensor:
        ctx.way, ctx.index = way, index
        way.sent[index] = way.forward(partial, way.group)
        return _stand_in(partial)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.way.returned.pop(ctx.index).wait()
        return gradient, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: _Way, *under_way: Tensor) -> Tensor:
        ctx.way = way
        return way.all_of(way.sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, *tuple[Tensor, ...]]:
        way: _Way = ctx.way
        for index, chunk in reversed(list(enumerate(gradient.split(way.sizes)))):
            way.returned[index] = way.backward(chunk, way.group)
        return None, *(way.returned[index].result for index in range(len(way.sizes)))
