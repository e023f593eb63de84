"""Norms over the model dim. A new norm is one class here, registered under its recipe name."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from megalm.distributed.collectives import sum_gradient
from megalm.distributed.sharding import ShardSpec
from megalm.nn import ops
from megalm.registry import Registry
from megalm.tensor_parallel.initialize import Initializer

NORMS: Registry[type[Norm]] = Registry("norm")


class Norm(nn.Module):
    """A norm with a weight, whose gradient is summed over the tokens that the ranks of `group` share out.

    `group` is the tensor group under sequence parallelism, otherwise None: then every rank sees every token.
    """

    def __init__(
        self,
        name: str,
        hidden: int,
        *,
        eps: float,
        bias: bool,
        group: dist.ProcessGroup | None,
        init: Initializer,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        self.weight = init.constant(ShardSpec.whole(f"{name}.weight", (hidden,)), 1.0)
        self.bias = init.constant(ShardSpec.whole(f"{name}.bias", (hidden,)), 0.0) if bias else None

    def shared(self, parameter: Tensor) -> Tensor:
        """Return the parameter so that its gradient covers the tokens of all ranks."""
        return parameter if self.group is None else sum_gradient(parameter, self.group)


@NORMS.register("layernorm")
class LayerNorm(Norm):
    """LayerNorm with weight and, where the recipe has biases, bias."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise over D."""
        bias = None if self.bias is None else self.shared(self.bias)
        return ops.layer_norm(x_BTD, self.shared(self.weight), bias, eps=self.eps)


@NORMS.register("rmsnorm")
class RMSNorm(Norm):
    """RMSNorm; it has no bias."""

    def __init__(
        self,
        name: str,
        hidden: int,
        *,
        eps: float,
        bias: bool,
        group: dist.ProcessGroup | None,
        init: Initializer,
    ) -> None:
        del bias  # a recipe's biases are those of linear layers and LayerNorm
        super().__init__(name, hidden, eps=eps, bias=False, group=group, init=init)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise over D."""
        return ops.rms_norm(x_BTD, self.shared(self.weight), eps=self.eps)
