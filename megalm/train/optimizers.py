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
from megalm.registry import Registry

Groups = list[dict[str, Any]]
OPTIMIZERS: Registry[Callable[[Groups, OptimSection], torch.optim.Optimizer]] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
def adamw(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019); torch's fused kernel, on the CPU too."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
