"""The feed-forward half of a block. A new activation is one line in ACTIVATIONS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelSection
from megalm.nn.activations import relu
from megalm.nn.ops import Operations, select_operations
from megalm.registry import Registry
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.tensor_parallel.recomputation import Origin, remember


@dataclass(frozen=True)
class Activation:
    """A function of `parts` projections of the same input side by side, [..., parts * F], to [..., F]."""

    parts: int
    apply: Callable[[Operations, Tensor], Tensor]
    keeps_input: bool = True
    """Its backward pass keeps the projections, and not its result."""


ACTIVATIONS: Registry[Activation] = Registry("activation")
ACTIVATIONS.register("relu")(Activation(1, lambda operations, x: relu(x), keeps_input=False))
# So et al. 2021 (Primer)
ACTIVATIONS.register("relu2")(Activation(1, lambda operations, x: relu(x).square(), keeps_input=False))
ACTIVATIONS.register("gelu")(Activation(1, lambda operations, x: operations.gelu(x)))
ACTIVATIONS.register("gelu_erf")(Activation(1, lambda operations, x: F.gelu(x)))
ACTIVATIONS.register("silu")(Activation(1, lambda operations, x: F.silu(x)))
ACTIVATIONS.register("geglu")(Activation(2, lambda operations, x: operations.geglu(x)))
ACTIVATIONS.register("swiglu")(Activation(2, lambda operations, x: operations.swiglu(x)))


def activate(activation: Activation, operations: Operations, x: Tensor, again: bool) -> tuple[Tensor, Origin | None]:
    """Return the function of x, and its origin where it is to be made `again` and its backward pass keeps x."""
    apply = partial(activation.apply, operations)
    return remember(apply(x), x, apply) if again and activation.keeps_input else (apply(x), None)


class MLP(nn.Module):
    """down(activation(up(x))), F split over the tensor axis: x_BTD -> y_BTD (x_BTtD -> y_BTtD with `sequence`).

    F is `features`, else the recipe's.
    """

    def __init__(
        self,
        name: str,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
        features: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS.get(config.activation)
        self.operations = select_operations(config.kernels, init.device)
        features = config.feed_forward if features is None else features
        self.up = ColumnParallelLinear(
            f"{name}.up",
            config.hidden,
            features,
            group=group,
            init=init,
            std=config.matrix_std,
            bias=config.bias,
            sequence=sequence,
            parts=self.activation.parts,
        )
        self.down = RowParallelLinear(
            f"{name}.down",
            features,
            config.hidden,
            group=group,
            init=init,
            std=config.matrix_std,
            shrink=config.residual_shrink,
            bias=config.bias,
            sequence=sequence,
        )

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """Return the block's second contribution to the residual stream.

        With its `origin` x is made again in the backward pass, and so is what the activation makes.
        """
        again = origin is not None
        return self.down(*activate(self.activation, self.operations, self.up(x, origin), again))
