"""The optimizers a recipe can choose. A new kind is one function here, registered under its recipe name.

Which tensors are decayed depends on logical names and shapes alone, so it is the same under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megalm.config.optim import OptimSection
from megalm.distributed.sharding import ShardSpec
from megalm.nn.ops import select_operations
from megalm.registry import Registry
from megalm.train.adafactor import Adafactor
from megalm.train.foreign_optimizers import EightBitAdamW, apex_adamw
from megalm.train.muon import Muon
from megalm.train.narrow_state import NarrowState
from megalm.zero.engine import shard_of

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


@OPTIMIZERS.register("adam")
def adam(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba 2015), whose weight decay is a part of the gradient."""
    return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@OPTIMIZERS.register("sgd")
def sgd(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return stochastic gradient descent, with momentum where the recipe has it."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


@OPTIMIZERS.register("rmsprop")
def rmsprop(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return RMSprop (Hinton 2012)."""
    return torch.optim.RMSprop(groups, lr=config.lr, alpha=config.alpha, eps=config.eps, momentum=config.momentum)


@OPTIMIZERS.register("adagrad")
def adagrad(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return Adagrad (Duchi et al. 2011)."""
    return Adagrad(groups, lr=config.lr, eps=config.eps)


class Adagrad(torch.optim.Optimizer):
    """g += decay w, v += g^2, w -= lr g / (sqrt(v) + eps). DeepSpeed makes torch's anew without its groups."""

    def __init__(self, groups: Groups, *, lr: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                    if "sum" not in self.state[weight]:
                        self.state[weight]["sum"] = torch.zeros_like(weight)
                    total = self.state[weight]["sum"]
                    total.addcmul_(gradient, gradient)
                    weight.addcdiv_(gradient, total.sqrt().add_(group["eps"]), value=-group["lr"])


@OPTIMIZERS.register("lion")
def lion(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return Lion; its rate should be a third to a tenth of AdamW's."""
    return Lion(groups, lr=config.lr, betas=config.betas)


class Lion(torch.optim.Optimizer):
    """w -= lr (sign(b1 m + (1 - b1) g) + decay w), then m = b2 m + (1 - b2) g (Chen et al. 2023)."""

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if "exp_avg" not in self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
                average = self.state[weight]["exp_avg"]
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.sub_(average.lerp(weight.grad, 1.0 - first).sign_(), alpha=group["lr"])
                average.lerp_(weight.grad, 1.0 - second)


@OPTIMIZERS.register("adafactor")
def adafactor(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return Adafactor, whose state is as good as none."""
    return Adafactor(groups, lr=config.lr)


@OPTIMIZERS.register("muon")
def muon(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return Muon for hidden matrices, with AdamW for all else."""
    return Muon(
        groups,
        lr=config.lr,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_ns_steps,
        adjust_lr_fn=config.muon_adjust_lr_fn,
        betas=config.betas,
        eps=config.eps,
    )


@OPTIMIZERS.register("adamw8bit")
def adamw8bit(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return AdamW with a state of 8 bits, which torchao has."""
    return EightBitAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


@OPTIMIZERS.register("apex_adamw")
def apex(groups: Groups, config: OptimSection) -> torch.optim.Optimizer:
    """Return NVIDIA apex's FusedAdam."""
    return apex_adamw(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def build_optimizer(
    config: OptimSection, tensors: Sequence[tuple[ShardSpec, Tensor]], width_factor: float = 1.0, seed: int = 0
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the tensors, a group for each way in which parameters are treated.

    `width_factor` is the model's, how many times as wide as muP's base it is; `seed` the run's, for a state that is
    rounded at random.

    A group's factor is its `lr_scale`. The groups are in the order decayed, not decayed, then those of rules. Without
    tensors, as on a pipeline stage that is frozen, nothing is ever updated.
    """
    if not tensors:
        return torch.optim.SGD([{"params": [], "lr_scale": 1.0}], lr=config.lr)
    made = [
        {"params": params, "weight_decay": how.weight_decay, "lr_scale": how.lr}
        | ({"muon": how.muon} if config.kind == "muon" else {})
        for how, params in grouped(config, tensors, width_factor)
    ]
    optimizer = OPTIMIZERS.get(config.kind)(made, config)
    return optimizer if config.state_dtype is None else NarrowState(optimizer, seed)


class Treatment(NamedTuple):
    """Weight decay, factor of the learning rate, and whether Muon updates it, of a parameter."""

    weight_decay: float
    lr: float
    muon: bool = False


def grouped(
    config: OptimSection, tensors: Sequence[tuple[ShardSpec, Tensor]], width_factor: float = 1.0
) -> list[tuple[Treatment, list[Tensor]]]:
    """Return the optimizer's groups in order: how each is treated, and its tensors."""
    groups: dict[Treatment, list[Tensor]] = {Treatment(config.weight_decay, 1.0): [], Treatment(0.0, 1.0): []}
    for spec, tensor in tensors:
        groups.setdefault(treatment(config, spec, width_factor), []).append(tensor)
    return [(how, members) for how, members in groups.items() if members]


def treatment(config: OptimSection, spec: ShardSpec, width_factor: float = 1.0) -> Treatment:
    """Return how a parameter is treated, by its logical name and whole shape.

    Matrices of a model that is wider than muP's base learn slower by that, and lose no less in a step for it; not
    those of Muon, as what an orthogonal matrix gives is as large at every width.
    """
    decay = config.weight_decay if is_decayed(spec) else 0.0
    rule, factor = config.rule_of(spec.name), 1.0
    if rule is not None:
        decay, factor = decay if rule.weight_decay is None else rule.weight_decay, rule.lr
    by_muon = is_hidden_matrix(spec) and config.is_muons(spec.name)
    if config.kind == "muon" and not by_muon and config.adamw_lr is not None:
        factor *= config.adamw_lr / config.lr
    if width_factor != 1.0 and is_hidden_matrix(spec) and not by_muon:
        decay, factor = decay * width_factor, factor / width_factor
    return Treatment(decay, factor, by_muon)


def freeze(config: OptimSection, parameters: Iterable[nn.Parameter]) -> None:
    """Make those parameters need no gradient that a rule freezes; before their engine is built."""
    for parameter in parameters:
        rule = config.rule_of(shard_of(parameter).name)
        if rule is not None and rule.freeze:
            parameter.requires_grad_(False)


def rules_without_parameters(config: OptimSection, names: Sequence[str]) -> list[bool]:
    """Return for each rule whether it matches none of the logical names."""
    return [not any(fnmatchcase(name, rule.match) for name in names) for rule in config.rules]


def is_hidden_matrix(spec: ShardSpec) -> bool:
    """Return whether both sides of a parameter grow with the model's width: the matrices of the blocks.

    Not tables of scores, which have a side of heads or experts.
    """
    matrix = spec.name.startswith("blocks.") and spec.name.endswith(".weight") and len(spec.global_shape) >= 2
    return matrix and not spec.name.endswith((".relative.weight", ".router.weight"))


def is_decayed(spec: ShardSpec) -> bool:
    """Return whether weight decay applies: to matrices and embeddings, not to norms and biases."""
    return spec.name.endswith(".weight") and len(spec.global_shape) >= 2
