"""Linear layers whose weight is split over the tensor axis.

A column-parallel layer followed by a row-parallel one needs one collective in each direction
(Shoeybi et al. 2019, section 3). With `sequence` the activations between such pairs are split over the
tokens instead of replicated, and the collectives become all-gather and reduce-scatter of the same volume
(Korthikanti et al. 2022, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.distributed.collectives import (
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
    sum_gradient,
)
from megalm.distributed.sharding import ShardSpec
from megalm.tensor_parallel.chunks import entered, entering, leaving
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.recomputation import Origin, made_again


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b; `F.linear` is looked up at each call, as DeepSpeed's stage 3 replaces it."""
    return F.linear(x, weight, bias)


def shared_input(
    x: Tensor, origin: Origin | None, group: dist.ProcessGroup, sequence: bool
) -> tuple[Tensor, Origin | None]:
    """Return x_BTD of x_BTD (x_BTtD with `sequence`) for products that are split over `group`, and its origin."""
    if not sequence:
        return copy_to_group(x, group), origin
    gathered = None if origin is None else origin.then(lambda part: gather_sequence(part, group))
    return gather_sequence(x, group), gathered


class Linear(nn.Module):
    """A layer with products by weights, all taken by `linear`, which a schedule or fp8 may set to their own.

    With `chunks` above 1 one that is split over tensor ranks takes its tokens in so many pieces, see `chunks`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear: Callable[..., Tensor] = linear
        self.chunks = 1


class ColumnParallelLinear(Linear):
    """Split a linear layer's output features over the tensor axis: y = x W^T + b.

    x_BTD (x_BTtD with `sequence`) -> y_BTFt. With `parts` > 1 the layer holds that many projections of the same
    input, weight [parts, F, D], and returns them side by side: y_BT(parts * Ft); each part is split by itself, so
    the logical weight does not depend on the layout. `interleaved` is that of the weight's `ShardSpec`. The last
    rank's rows are padded with zeros where the group's size does not divide F. The backward pass sums dx over `group`:
    every rank of it must call.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        std: float,
        bias: bool,
        sequence: bool = False,
        parts: int = 1,
        interleaved: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence = sequence
        leading = (parts,) if parts > 1 else ()
        index, count = group.rank(), group.size()
        dim = len(leading)
        shape = (*leading, out_features, in_features)
        spec = replace(ShardSpec.split(f"{name}.weight", shape, dim, index, count), interleaved=interleaved)
        self.weight = init.matrix(spec, std)
        self.bias = None
        if bias:
            spec = ShardSpec.split(f"{name}.bias", shape[:-1], dim, index, count)
            self.bias = init.constant(spec, 0.0)

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """Return this rank's output features. With its `origin` x is made again in the backward pass, and gathered."""
        weight, bias = self.weight.flatten(0, -2), None if self.bias is None else self.bias.flatten()
        if self.chunks > 1 and self.group.size() > 1:
            products = []
            for part, made in entering(x, origin, self.group, self.sequence, self.chunks):
                with made_again(part, made):
                    products.append(self.linear(part, weight, bias))
            return entered(products, x, self.group, self.sequence)
        x, origin = shared_input(x, origin, self.group, self.sequence)
        with made_again(x, origin):
            return self.linear(x, weight, bias)


class RowParallelLinear(Linear):
    """Split a linear layer's input features over the tensor axis: y = sum over ranks of x_t W_t^T, plus b.

    x_BTFt -> y_BTD (y_BTtD with `sequence`). The forward pass sums over `group`: every rank of it must call.
    The bias is added once, after the sum. `shrink` is a factor of the first values.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        std: float,
        bias: bool,
        sequence: bool = False,
        shrink: float = 1.0,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence = sequence
        index, count = group.rank(), group.size()
        spec = ShardSpec.split(f"{name}.weight", (out_features, in_features), 1, index, count)
        self.weight = init.matrix(spec, std, shrink)
        self.bias = None
        if bias:
            self.bias = init.constant(ShardSpec.whole(f"{name}.bias", (out_features,)), 0.0)

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """Return the whole output features, of all tokens or (with `sequence`) of this rank's tokens.

        With its `origin` x is made again in the backward pass.
        """
        with made_again(x, origin):
            if self.group.size() == 1:
                return self.linear(x, self.weight, self.bias)
            if self.chunks > 1:
                y = leaving(x, self.group, self.sequence, self.chunks, lambda part: self.linear(part, self.weight))
            else:
                y = self.linear(x, self.weight)
        if self.chunks == 1:
            y = reduce_scatter_sequence(y, self.group) if self.sequence else reduce_from_group(y, self.group)
        if self.bias is None:
            return y
        return y + (sum_gradient(self.bias, self.group) if self.sequence else self.bias)
