"""Latent attention of the reference: a token's keys, values and queries. Source: DeepSeek-V2, 2024, section 2.1.

Sizes: R features turn with the position, N do not, V are a value's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megalm.config.model import ModelSection

if TYPE_CHECKING:
    from tests.parity.reference_model import Formulas


def latent_sizes(model: ModelSection) -> tuple[int, int, int]:
    """Return R, N and V."""
    fixed = model.hidden // model.heads if model.nope_head_dim is None else model.nope_head_dim
    turning = 2 * max(1, fixed // 4) if model.rope_head_dim is None else model.rope_head_dim
    return turning, fixed, fixed if model.value_head_dim is None else model.value_head_dim


def latent_shapes(model: ModelSection, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the attention's projections but the last, by name."""
    turning, fixed, value = latent_sizes(model)
    heads, width, rank = model.heads, model.hidden, model.kv_rank
    assert rank is not None
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.kv_down.weight": (rank + turning, width),
        f"{name}.kv_latent_norm.weight": (rank,),
        f"{name}.kv_up.weight": (heads * (fixed + value), rank),
    }
    if model.q_rank is None:
        return shapes | {f"{name}.q.weight": (heads * (turning + fixed), width)}
    return shapes | {
        f"{name}.q_down.weight": (model.q_rank, width),
        f"{name}.q_latent_norm.weight": (model.q_rank,),
        f"{name}.q_up.weight": (heads * (turning + fixed), model.q_rank),
    }


def latent_heads(
    formulas: Formulas, x: Tensor, name: str, turn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k [rows,H,T,N+R] and v [rows,H,T,V] of x [rows,T,D], one head at a time."""
    model, w = formulas.model, formulas.w
    turning, fixed, value = latent_sizes(model)
    rank = w[f"{name}.kv_up.weight"].shape[1]
    down = w[f"{name}.kv_down.weight"]
    latent = formulas.norm(x @ down[:rank].T, f"{name}.kv_latent_norm")
    shared = x @ down[rank:].T
    which, query_latent = "q", x
    if model.q_rank is not None:
        which = "q_up"
        query_latent = formulas.norm(x @ w[f"{name}.q_down.weight"].T, f"{name}.q_latent_norm")
    queries, keys, values = [], [], []
    for head in range(model.heads):
        own = w[f"{name}.{which}.weight"][head * (turning + fixed) : (head + 1) * (turning + fixed)]
        queries.append(torch.cat((query_latent @ own[turning:].T, turn(query_latent @ own[:turning].T)), dim=-1))
        own = w[f"{name}.kv_up.weight"][head * (fixed + value) : (head + 1) * (fixed + value)]
        keys.append(torch.cat((latent @ own[:fixed].T, turn(shared)), dim=-1))
        values.append(latent @ own[fixed:].T)
    return torch.stack(queries, dim=1), torch.stack(keys, dim=1), torch.stack(values, dim=1)
