"""Linear layers whose backward pass gives the gradient of its input at once and those of its weights later.

Exact, as nothing is computed twice or otherwise: the two products of a linear layer's backward are taken at two times.
What the second needs, the layer's input and the gradient of its output, is all that is kept; the graph is freed by the
first, recomputed parts are recomputed once. Gradients of other weights (norms, embeddings) are cheap and are made in
the first half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class Owed:
    """The gradients that one linear layer owes its weight [F, D] and bias [F] for one microbatch.

    Either may have no edge: it is frozen, or there is none. A layer whose tokens go through in chunks owes their sum:
    `more` are the inputs and gradients of the other chunks.
    """

    x: Tensor
    gradient: Tensor
    weight: GradientEdge | None
    bias: GradientEdge | None
    more: tuple[tuple[Tensor, Tensor], ...] = ()

    def is_to(self, weight: GradientEdge | None, bias: GradientEdge | None) -> bool:
        """Return whether these are the parameters that it is owed to."""
        return _same(self.weight, weight) and _same(self.bias, bias)

    def pay(self) -> None:
        """Make the gradients and pass them on, through views and collectives, to what the layer was given.

        They end in the parameters' `.grad`, as those of `torch.autograd.backward` do, and set off the same hooks.
        """
        with torch.no_grad():
            gradient_NF = self.gradient.flatten(0, -2)
            weight = None if self.weight is None else gradient_NF.t() @ self.x.flatten(0, -2)
            bias = None if self.bias is None else gradient_NF.sum(0)
            for x_ND, gradient_NF in self.more:
                if weight is not None:
                    weight.addmm_(gradient_NF.t(), x_ND)
                if bias is not None:
                    bias += gradient_NF.sum(0)
        for edge, value in ((self.weight, weight), (self.bias, bias)):
            if edge is not None:
                torch.autograd.backward(edge, value)


class WeightGradients:
    """What the backward passes of one stage owe to weights, in the order in which they came to owe it."""

    def __init__(self) -> None:
        self._owed: list[Owed] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b, as `F.linear` does; its backward pass owes the gradients of W and b.

        Where x needs no gradient there is nothing to do first, and the gradients come at once.
        """
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not (torch.is_grad_enabled() and x.requires_grad and trained):
            return F.linear(x, weight, bias)
        edges = [_edge(weight), _edge(bias)]
        y: Tensor = _LaterWeights.apply(x, weight.detach(), None if bias is None else bias.detach(), edges, self._owed)
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


def _edge(parameter: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(parameter) if parameter is not None and parameter.requires_grad else None


def _same(one: GradientEdge | None, other: GradientEdge | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.node is other.node and one.output_nr == other.output_nr


class _LaterWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        edges: list[GradientEdge | None],
        owed: list[Owed],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.edges, ctx.owed = edges, owed
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight = ctx.saved_tensors
        owed: list[Owed] = ctx.owed
        for place in reversed(range(len(owed))):
            if owed[place].is_to(*ctx.edges):
                piece = (x.detach().flatten(0, -2), gradient.flatten(0, -2))
                owed[place] = replace(owed[place], more=(*owed[place].more, piece))
                break
        else:
            owed.append(Owed(x.detach(), gradient, *ctx.edges))
        return gradient @ weight, None, None, None, None
