"""The optimizers a recipe can choose. A new kind is one function here, registered under its recipe name.

Which tensors are decayed depends on logical names and shapes alone, so it is the same under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm.config.run import OptimSection
from megalm.distributed.sharding import ShardSpec
from megalm.nn.ops import select_operations
from megalm.registry import Registry

Groups = list[dict[str, Any]]
OPTIMIZERS: Registry[Callable[[Groups, OptimSection], torch.optim.Optimizer]] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
def adamw(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019); torch's fused kernel, on the CPU too."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@OPTIMIZERS.register("fused_adamw")
def fused_adamw(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return AdamW as one launch of our own kernel a group."""
    return FusedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW by `kernels.adamw`; state and hyperparameters have the names that torch.optim.AdamW gives them.

    The tensors of a group have made the same number of steps.
    """

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._update_ = select_operations("auto", self.param_groups[0]["params"][0].device).adamw_

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [self._state_of(weight) for weight in weights]
            for state in states:
                state["step"] += 1
            if weights:
                self._update_(
                    weights,
                    [weight.grad for weight in weights],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(states[0]["step"]),
                )

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for nothing
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


@OPTIMIZERS.register("sgd")
def sgd(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return stochastic gradient descent, with momentum where the recipe has it."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def build_optimizer(config: OptimSection, tensors: Sequence[tuple[ShardSpec, Tensor]]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the tensors, in two groups: decayed and not."""
    decayed = [tensor for spec, tensor in tensors if is_decayed(spec)]
    others = [tensor for spec, tensor in tensors if not is_decayed(spec)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (others, 0.0))
        if params
    ]
    return OPTIMIZERS.get(config.kind)(groups, config)


def is_decayed(spec: ShardSpec) -> bool:
    """Return whether weight decay applies: to matrices and embeddings, not to norms and biases."""
    return spec.name.endswith(".weight") and len(spec.global_shape) >= 2
