"""Optimizers that torch has not, or has for whole and separate matrices only, as formulas on one process."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from tests.parity.reference_latent import latent_sizes


class Lion(torch.optim.Optimizer):
    """Lion, one tensor at a time. Source: Chen et al. 2023, algorithm 2."""

    def step(self) -> None:  # type: ignore[override]
        """Update all tensors."""
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                average = self.state[weight].get("average", torch.zeros_like(weight))
                direction = torch.sign(first * average + (1.0 - first) * weight.grad)
                weight.sub_(group["lr"] * (direction + group["weight_decay"] * weight))
                self.state[weight]["average"] = second * average + (1.0 - second) * weight.grad


class Muon(torch.optim.Optimizer):
    """Muon of the matrices that a group's `rows` name, AdamW of groups without. Source: Jordan et al. 2024.

    By the singular values: five times s -> a s + b s^3 + c s^5 of each, first as a share of the matrix's norm.
    """

    def step(self) -> None:  # type: ignore[override]
        """Update all tensors."""
        for group in self.param_groups:
            (weight,) = group["params"]
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            if group["rows"] is None:
                self._adamw(group, weight)
                continue
            share = group["momentum"]
            average = share * self.state[weight].get("average", 0.0) + (1.0 - share) * weight.grad
            self.state[weight]["average"] = average
            ahead = share * average + (1.0 - share) * weight.grad if group["nesterov"] else average
            flat, ahead = weight.view(-1, weight.shape[-1]), ahead.reshape(-1, weight.shape[-1])
            for rows in group["rows"]:
                flat[rows] -= group["lr"] * self._direction(ahead[rows], group)

    def _direction(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        sizes = sizes / max(float(matrix.square().sum().sqrt()), 1e-7)
        for _ in range(group["steps"]):
            sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
        outputs, inputs = matrix.shape
        scale = {
            "original": max(1.0, outputs / inputs) ** 0.5,
            "match_rms_adamw": 0.2 * max(outputs, inputs) ** 0.5,
        }[group["scale"]]
        return scale * (left * sizes) @ right

    def _adamw(self, group: dict[str, Any], weight: Tensor) -> None:
        state, (first, second) = self.state[weight], group["betas"]
        steps = state["steps"] = state.get("steps", 0) + 1
        state["mean"] = first * state.get("mean", 0.0) + (1.0 - first) * weight.grad
        state["square"] = second * state.get("square", 0.0) + (1.0 - second) * weight.grad**2
        size = (state["square"] / (1.0 - second**steps)).sqrt() + group["eps"]
        weight -= group["lr"] * state["mean"] / (1.0 - first**steps) / size


def matrix_rows(model: ModelSection, name: str, weight: Tensor) -> list[Tensor]:
    """Return the rows of each matrix of a block's weight [..., in], over all dims but the last."""
    rows = torch.arange(weight.numel() // weight.shape[-1])
    if name.endswith(".qkv.weight"):  # of each key/value head: its queries, their gates, its key, its value
        gates = model.heads // model.key_value_heads if model.attention_gate else 0
        heads = ["q"] * (model.heads // model.key_value_heads) + ["g"] * gates + ["k", "v"]
        kinds = [kind for kind in heads for _ in range(model.head_size)] * model.key_value_heads
        return [rows[[kind == wanted for kind in kinds]] for wanted in "qgkv" if wanted in kinds]
    if name.endswith(".kv.weight"):
        return list(rows.chunk(2))
    if model.kv_rank is not None and name.endswith((".q.weight", ".q_up.weight", ".kv_down.weight", ".kv_up.weight")):
        turning, fixed, value = latent_sizes(model)
        first, second = {"q": (turning, fixed), "q_up": (turning, fixed), "kv_up": (fixed, value)}.get(
            name.split(".")[-2], (model.kv_rank, turning)
        )
        return [rows[rows % (first + second) < first], rows[rows % (first + second) >= first]]
    return list(rows.chunk(math.prod(weight.shape[:-2])))
