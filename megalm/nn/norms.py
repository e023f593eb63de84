"""Norms over the model dim. A new norm is one class here, registered under its recipe name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.model import ModelSection
from megalm.distributed.collectives import sum_gradient
from megalm.distributed.sharding import ShardSpec
from megalm.nn.masks import Drop
from megalm.nn.ops import Operations
from megalm.registry import Registry
from megalm.tensor_parallel.initialize import Initializer

NORMS: Registry[type[Norm]] = Registry("norm")


class Norm(nn.Module):
    """A norm with a weight, whose gradient is summed over the tokens that the ranks of `group` share out.

    `group` is the tensor group under sequence parallelism, otherwise None: then every rank sees every token.
    """

    first_weight = 1.0

    def __init__(
        self,
        name: str,
        hidden: int,
        *,
        eps: float,
        bias: bool,
        group: dist.ProcessGroup | None,
        init: Initializer,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        self.operations = operations
        self.weight = init.constant(ShardSpec.whole(f"{name}.weight", (hidden,)), self.first_weight)
        self.bias = init.constant(ShardSpec.whole(f"{name}.bias", (hidden,)), 0.0) if bias else None

    def shared(self, parameter: Tensor) -> Tensor:
        """Return the parameter so that its gradient covers the tokens of all ranks."""
        return parameter if self.group is None else sum_gradient(parameter, self.group)

    def forward(self, x_BTD: Tensor, residual: Tensor | None = None, drop: Drop | None = None) -> Any:
        """Normalise x_BTD over D; with `residual` return (norm of the sum, sum) of the sum residual + dropped x_BTD."""
        bias = None if self.bias is None else self.shared(self.bias)
        return self.normalise(x_BTD, self.shared(self.weight), bias, residual=residual, drop=drop)

    def again(self) -> Callable[[Tensor], Tensor] | None:
        """Return what makes the same of the same x_BTD (or sum) again, without gradients, by the weights of now.

        None where they are no longer here, as those that ZeRO 3 divides and does not let persist.
        """
        if self.weight.numel() == 0:
            return None
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        return lambda x_BTD: self.normalise(x_BTD, weight, bias)

    def normalise(self, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor | None, **addition: Any) -> Any:
        """Compute `forward` with these weights; `addition` are its other arguments."""
        raise AssertionError(f"{type(self).__name__} has no formula")


@NORMS.register("layernorm")
class LayerNorm(Norm):
    """LayerNorm with weight and, where the recipe has biases, bias."""

    def normalise(self, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor | None, **addition: Any) -> Any:
        """Normalise over D, after the residual addition where there is one."""
        return self.operations.layer_norm(x_BTD, weight_D, bias_D, eps=self.eps, **addition)


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
        operations: Operations,
    ) -> None:
        del bias  # a recipe's biases are those of linear layers and LayerNorm
        super().__init__(name, hidden, eps=eps, bias=False, group=group, init=init, operations=operations)

    def normalise(self, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor | None, **addition: Any) -> Any:
        """Normalise over D, after the residual addition where there is one."""
        return self.operations.rms_norm(x_BTD, weight_D, eps=self.eps, **addition)


@NORMS.register("rmsnorm_zero_centered")
class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm times 1 + weight, added in fp32 or wider: around zero a weight of 16 bits has more digits (Gemma)."""

    first_weight = 0.0

    def normalise(self, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor | None, **addition: Any) -> Any:
        """Normalise over D, after the residual addition where there is one."""
        factor_D = 1.0 + weight_D.to(torch.promote_types(weight_D.dtype, torch.float32))
        return super().normalise(x_BTD, factor_D, bias_D, **addition)


def build_norm(
    name: str, config: ModelSection, *, group: dist.ProcessGroup | None, init: Initializer, operations: Operations
) -> Norm:
    """Return the recipe's norm of the residual stream; `group` is the tensor group under sequence parallelism."""
    return NORMS.get(config.norm)(
        name, config.hidden, eps=config.norm_eps, bias=config.bias, group=group, init=init, operations=operations
    )
