"""The mixture of experts of the reference: every expert computes every token, and what a token has not chosen counts 0.

Who chooses whom is found out one token at a time. Shapes: rows of T tokens, E experts, k of them a token's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalm.config.model import ModelSection


@dataclass
class Routing:
    """What routers know beside their weights, and what they leave behind: sums over the tokens that `mask` has.

    `mask`, bool [rows,T], says which tokens count; None: all.
    """

    biases: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    balance: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    loads: dict[str, list[int]] = field(default_factory=dict)


def shapes(model: ModelSection, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a router's and its experts' weights; shared experts are an MLP."""
    up = (2, model.expert_features) if model.activation in ("swiglu", "geglu") else (model.expert_features,)
    assert model.experts is not None
    return {
        f"{name}.router.weight": (model.experts, model.hidden),
        f"{name}.experts.up.weight": (model.experts, *up, model.hidden),
        f"{name}.experts.down.weight": (model.experts, model.hidden, model.expert_features),
    }


def mixture(
    model: ModelSection,
    routing: Routing,
    x: Tensor,
    weight: Tensor,
    wide: torch.dtype,
    name: str,
    expert: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return the sum of what `expert` gives for x [rows,T,D] and the number of each expert, weighted by the gates."""
    assert model.experts is not None
    logits = x.to(wide) @ weight.to(wide).T
    scores = torch.sigmoid(logits) if model.router_score == "sigmoid" else torch.softmax(logits, dim=-1)
    chosen = choices(model, scores, routing.biases.get(name))
    gates = scores * chosen
    if model.experts_per_token > 1:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    _leave_sums(model, routing, logits, scores, chosen, name)
    gates = (gates * taken(model, chosen)).to(x.dtype)
    return sum((gates[..., e : e + 1] * expert(x, e) for e in range(model.experts)), torch.zeros_like(x))


def choices(model: ModelSection, scores: Tensor, bias: Tensor | None) -> Tensor:
    """Return 1 for the experts of each token, [rows,T,E]: those of the highest scores."""
    chosen = torch.zeros_like(scores)
    for row in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            ranked = (scores[row, t] if bias is None else scores[row, t] + bias).tolist()
            best = sorted(range(len(ranked)), key=lambda e: -ranked[e])[: model.experts_per_token]
            chosen[row, t, best] = 1.0
    return chosen


def taken(model: ModelSection, chosen: Tensor) -> Tensor:
    """Return 1 where an expert takes a token, [rows,T,E]: the first of a row, as many as it has capacity for."""
    if model.capacity_factor is None:
        return torch.ones_like(chosen)
    rows, length, experts = chosen.shape
    capacity = math.ceil(model.capacity_factor * length * model.experts_per_token / experts)
    result = torch.zeros_like(chosen)
    for row in range(rows):
        full = [0] * experts
        for t in range(length):
            for e in range(experts):
                if chosen[row, t, e] and full[e] < capacity:
                    full[e] += 1
                    result[row, t, e] = 1.0
    return result


def _leave_sums(
    model: ModelSection, routing: Routing, logits: Tensor, scores: Tensor, chosen: Tensor, name: str
) -> None:
    assert model.experts is not None
    loads = routing.loads.setdefault(name, [0] * model.experts)
    for row in range(len(logits)):
        counts = torch.ones_like(logits[row, :, 0], dtype=torch.bool) if routing.mask is None else routing.mask[row]
        valid = int(counts.sum())
        if not valid:
            continue
        shares = scores[row][counts] / scores[row][counts].sum(dim=-1, keepdim=True)
        often = chosen[row][counts].sum(dim=0)
        f = often * model.experts / (model.experts_per_token * valid)  # 1 each where loads are even
        routing.balance.append(valid * (f * shares.mean(dim=0)).sum())
        routing.z.append(torch.logsumexp(logits[row][counts], dim=-1).square().sum())
        for e in range(model.experts):
            loads[e] += int(often[e])
