"""Linear layers whose backward pass gives the gradient of its input at once and those of its weights later.

Exact, as nothing is computed twice or otherwise: the two products of a linear layer's backward are taken at two times.
What the second needs, the layer's input and the gradient of its output, is all that is kept; the graph is freed by the
first, recomputed parts are recomputed once. Gradients of other weights (norms, embeddings) are cheap and are made in
the first half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Products(Protocol):
    """A linear layer and the two products of its backward pass: x [..., D], weight [F, D], gradient (of y) [..., F]."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y = x W^T + b, with gradients."""

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of x, in its shape."""

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of the weight."""


class TorchProducts:
    """The products as torch has them, in the dtype of their operands."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y = x W^T + b, with gradients."""
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of x, in its shape."""
        return gradient @ weight

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of the weight."""
        return gradient.flatten(0, -2).t() @ x.flatten(0, -2)


@dataclass(frozen=True)
class Owed:
    """The gradients that one linear layer owes its weight [F, D] and bias [F] for one microbatch.

    Either may have no edge: it is frozen, or there is none. `pieces` are the input and the gradient of its output, of
    each chunk where a layer's tokens go through in chunks, and `products` makes the weight's of them.
    """

    pieces: tuple[tuple[Tensor, Tensor], ...]
    products: Products
    weight: GradientEdge | None
    bias: GradientEdge | None

    def is_to(self, weight: GradientEdge | None, bias: GradientEdge | None) -> bool:
        """Return whether these are the parameters that it is owed to."""
        return _same(self.weight, weight) and _same(self.bias, bias)

    def pay(self) -> None:
        """Make the gradients and pass them on, through views and collectives, to what the layer was given.

        They end in the parameters' `.grad`, as those of `torch.autograd.backward` do, and set off the same hooks.
        """
        with torch.no_grad():
            x_ND, gradient_NF = (_joined(tensors) for tensors in zip(*self.pieces, strict=True))
            weight = None if self.weight is None else self.products.weight_gradient(gradient_NF, x_ND)
            bias = None if self.bias is None else gradient_NF.sum(0)
        for edge, value in ((self.weight, weight), (self.bias, bias)):
            if edge is not None:
                torch.autograd.backward(edge, value)


_TORCH = TorchProducts()


class WeightGradients:
    """What the backward passes of one stage owe to weights, in the order in which they came to owe it."""

    def __init__(self) -> None:
        self._owed: list[Owed] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, products: Products = _TORCH) -> Tensor:
        """Return x W^T + b by `products`; its backward pass owes the gradients of W and b.

        Where x needs no gradient there is nothing to do first, and the gradients come at once.
        """
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not (torch.is_grad_enabled() and x.requires_grad and trained):
            return products.linear(x, weight, bias)
        edges = [_edge(weight), _edge(bias)]
        y: Tensor = _LaterWeights.apply(
            x, weight.detach(), None if bias is None else bias.detach(), edges, self._owed, products
        )
        return y

    def take(self) -> list[Owed]:
        """Return what has come to be owed since the last call."""
        owed = self._owed.copy()
        self._owed.clear()
        return owed


def pay(owed: list[Owed]) -> None:
    """Make the gradients that are owed, each freed as soon as it is passed on."""
    owed.reverse()
    while owed:
        owed.pop().pay()


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """Return the rows of all pieces, so that a sum over them is rounded once."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _edge(parameter: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(parameter) if parameter is not None and parameter.requires_grad else None


def _same(one: GradientEdge | None, other: GradientEdge | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.node is other.node and one.output_nr == other.output_nr


_LAYERS_AT_ONCE = 2
"""So many layers take the chunks of an input in turn: multi-query attention's two projections."""


class _LaterWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        edges: list[GradientEdge | None],
        owed: list[Owed],
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.edges, ctx.owed, ctx.products = edges, owed, products
        return products.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        piece, owed = (x.detach(), gradient), ctx.owed
        last = range(max(0, len(owed) - _LAYERS_AT_ONCE), len(owed))
        place = next((i for i in last if owed[i].is_to(*ctx.edges)), None)
        if place is None:
            owed.append(Owed((piece,), ctx.products, *ctx.edges))
        else:
            owed[place] = replace(owed[place], pieces=(*owed[place].pieces, piece))
        return ctx.products.input_gradient(gradient, weight), None, None, None, None, None
