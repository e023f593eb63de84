"""Muon (Jordan et al. 2024): the momentum of each hidden matrix, orthogonalised, is its update; AdamW for all others.

What is orthogonalised is the whole matrix that a layer applies, whatever the layout and however it is stored: queries,
gates, keys and values apart, though fused and grouped by key/value heads, and both projections of a gated MLP apart
(`ShardSpec`). `zero.wholes` puts each together at one rank, so that the ranks of a pipeline stage share the work; the
momentum stays where the weights are.
The update is that of torch.optim.Muon. The iteration runs in bf16 on GPUs, as the papers have it, which is then also
what travels; in fp32 on a CPU, where bf16 is no faster; in fp64 where the weights are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.zero.engine import replicas_of
from megalm.zero.parts import Part, PlacedOptimizer
from megalm.zero.wholes import Slab, Wholes

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, of steepest slope at 0 (Jordan et al. 2024)
_SMALLEST_NORM = 1e-7  # a matrix of a smaller one is no further enlarged
_MOMENTUM = "momentum_buffer"


class Muon(PlacedOptimizer):
    """Muon for the groups with `muon` true, AdamW for those with false; each group has its own rate and decay."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: str,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        others = [group for group in groups if not group["muon"]]
        # torch fills in what a group of AdamW has besides, in place.
        self._adamw = torch.optim.AdamW(others or [{"params": []}], lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._momentum, self._nesterov = momentum, nesterov
        self._ns_steps, self._adjust_lr_fn = ns_steps, adjust_lr_fn
        self._wholes: dict[tuple[Axis | int, ...], Wholes] = {}

    def kinds_of(self, group: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
        """Return those of a checkpoint's kinds of state that a group's tensors have."""
        return [kind for kind in kinds if kind == "ema" or (kind == _MOMENTUM) == group["muon"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; gradients are overwritten. All ranks of the stage must call."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        others = [group for group in self.param_groups if not group["muon"]]
        if others:
            self._adamw.param_groups, self._adamw.state = others, self.state
            self._adamw.step()
        hidden = [group for group in self.param_groups if group["muon"]]
        moved = [tensor for group in hidden for tensor in group["params"] if tensor.grad is not None]
        for tensor in moved:
            self._gather_momentum(tensor)
        self._orthogonalize(moved)
        for group in hidden:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor.mul_(1.0 - group["lr"] * group["weight_decay"])
                    tensor.add_(tensor.grad, alpha=-group["lr"])

    def _gather_momentum(self, tensor: Tensor) -> None:
        """Move the momentum to the gradient, and the gradient to what is to be orthogonalised."""
        state, gradient = self.state[tensor], tensor.grad
        assert gradient is not None
        if _MOMENTUM not in state:
            state[_MOMENTUM] = torch.zeros_like(tensor)
        state[_MOMENTUM].lerp_(gradient, 1.0 - self._momentum)
        if self._nesterov:
            gradient.lerp_(state[_MOMENTUM], self._momentum)
        else:
            gradient.copy_(state[_MOMENTUM])

    def _orthogonalize(self, tensors: Sequence[Tensor]) -> None:
        """Replace gradients by the update, for a rate of 1."""
        if not tensors:
            return
        placed: dict[Axis, list[tuple[Tensor, Part]]] = {"replica": [], "expert_replica": []}
        for tensor in tensors:
            for part in self.parts[tensor]:
                placed[replicas_of(part.shard)].append((tensor, part))
        for axis, own in placed.items():
            key = (axis, *map(id, tensors))  # ZeRO steps a group, or a part of one, at a time
            parts = [part for _, part in own]
            if parts and key not in self._wholes:
                self._wholes[key] = Wholes(
                    parts, self.mesh, self.divided, lambda slab: cost(slab, self._ns_steps), axis
                )
            if parts:
                values = [_values(tensor.grad, part) for tensor, part in own]
                self._wholes[key].transform(values, iteration_dtype(tensors[0].dtype, self.mesh), self._updates)

    def _updates(self, slabs: Sequence[tuple[Slab, Tensor]]) -> list[Tensor]:
        """Return the updates of whole slabs; matrices of one shape are worked on together."""
        found = [matrices(slab.shard, whole) for slab, whole in slabs]
        alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for at, own in enumerate(found):
            for place, matrix in enumerate(own):
                alike[matrix.shape[0], matrix.shape[1]].append((at, place))
        for (rows, columns), places in alike.items():
            stacked = torch.stack([found[at][place] for at, place in places])
            made = newton_schulz(stacked, self._ns_steps).mul_(update_scale(self._adjust_lr_fn, rows, columns))
            for (at, place), update in zip(places, made, strict=True):
                found[at][place] = update
        return [_interleaved(slab.shard, own) for (slab, _), own in zip(slabs, found, strict=True)]


def newton_schulz(stacked: Tensor, steps: int) -> Tensor:
    """Return matrices [N, R, C] with their singular values brought near 1, to 0.7 to 1.2 in five steps.

    A singular value s becomes a s + b s^3 + c s^5 in a step; they start as shares of the matrix's norm.
    """
    a, b, c = _COEFFICIENTS
    tall = stacked.shape[1] > stacked.shape[2]
    x = stacked.mT if tall else stacked
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update_scale(adjust_lr_fn: str, rows: int, columns: int) -> float:
    """Return what a matrix's orthogonalised momentum is multiplied by.

    `original`: what an input of size 1 gives moves by the rate, or by more where there are more outputs than inputs
    (Jordan et al. 2024). `match_rms_adamw`: weights move by 0.2 of the rate in the root mean square, as AdamW moves
    them (Liu et al. 2025, equation 4).
    """
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def iteration_dtype(weights: torch.dtype, mesh: ParallelMesh) -> torch.dtype:
    """Return the dtype in which matrices travel and are orthogonalised."""
    if weights is torch.float64:
        return weights
    return torch.float32 if mesh.device.type == "cpu" else torch.bfloat16


def matrices(shard: ShardSpec, whole: Tensor) -> list[Tensor]:
    """Return the matrices [R, C] of which a slab [rows, columns] of a parameter is made."""
    if not shard.interleaved:
        return [whole]
    grouped = whole.unflatten(0, (-1, sum(shard.interleaved)))
    return [part.flatten(0, 1) for part in grouped.split(list(shard.interleaved), dim=1)]


def _interleaved(shard: ShardSpec, parts: Sequence[Tensor]) -> Tensor:
    """Return the slab that is made of these matrices."""
    if not shard.interleaved:
        return parts[0]
    groups = [part.unflatten(0, (-1, rows)) for part, rows in zip(parts, shard.interleaved, strict=True)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def cost(slab: Slab, steps: int) -> float:
    """Return the multiplications that a slab's matrices take."""
    rows, columns = slab.shape
    shares = slab.shard.interleaved or (rows,)
    total = 0.0
    for share in shares:
        short, long = sorted((rows * share // sum(shares), columns))
        total += steps * short * short * (2.0 * long + short)
    return total


def _values(gradient: Tensor | None, part: Part) -> Tensor:
    assert gradient is not None
    return gradient.view(-1)[part.offset : part.offset + part.length]
