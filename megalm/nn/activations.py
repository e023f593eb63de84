"""Activations that Inductor's CPU programs would compute slower than ATen: in a compiled graph they have another form.

The forms are equal but for rounding, gradients included. Seen in torch 2.13; measured in docs/choices.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DOUBLED_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
"""Of 2u at x = 0."""


def gelu(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016).

    Compiled it is x sigmoid(2u), as (1 + tanh(u)) / 2 = sigmoid(2u): exp is inline in a loop of vectors, tanh a call in
    each round, which the backward pass repeats. Computed in fp32 or wider.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    doubled = DOUBLED_SLOPE * (wide + 0.044715 * wide * wide * wide)
    return (wide * torch.sigmoid(doubled)).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """Return gelu(gate) * up for x [..., 2F] = (gate, up) side by side (Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return gelu(gate) * up


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0), whose slope at 0 is 0.

    Compiled its backward pass reads the sign of the result, which is there for the next product. Of torch's own the
    program keeps where it is 0, and writes such a mask element by element.
    """
    return _Relu.apply(x) if torch.compiler.is_compiling() else F.relu(x)


class _Relu(torch.autograd.Function):
    """ReLU that keeps its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return max(x, 0)."""
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Return dy where the result is above 0."""
        (y,) = ctx.saved_tensors
        return dy * y.sign()
