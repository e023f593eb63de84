"""For which seeds Triton compiles kernels, where launches differ in nothing else.

    python -m tests.kernels.seed_variants

Prints JSON, {operation: ["operation: seed", ...]}. A process of its own, without TRITON_INTERPRET; nothing is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megalm.kernels.adamw import fused_adamw_
from megalm.kernels.attention import flash_attention
from megalm.kernels.dropout import dropout
from megalm.kernels.layernorm import layer_norm
from tests.kernels.compile_worker import record, set_target

SEEDS = (0, 1, 16, 17, 2**31, 2**32, 2**40 + 1, 2**63, 2**64 - 1)


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def _attention(seed: int) -> None:
    flash_attention(*(_bf16(1, 64, 2, 64) for _ in range(3)), causal=True, dropout=0.1, seed=seed).sum().backward()


def _norm(seed: int) -> None:
    x, residual, weight, bias = _bf16(1, 8, 64), _bf16(1, 8, 64), _bf16(64), _bf16(64)
    normed, _ = layer_norm(x, weight, bias, eps=1e-5, residual=residual, dropout=0.1, seed=seed)
    normed.sum().backward()


def _adamw(seed: int) -> None:
    lists = [[_bf16(64).detach()] for _ in range(4)]
    numbers = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fused_adamw_(*lists, **numbers, step=3, stochastic_rounding=True, seed=seed)


CALLS: dict[str, Callable[[int], object]] = {
    "attention": _attention,
    "norm": _norm,
    "adamw": _adamw,
    "dropout": lambda seed: dropout(_bf16(1, 8, 64), dropout=0.1, seed=seed).sum().backward(),
}


def main() -> None:
    """Print them; a kernel counts for the first seed that wants it."""
    set_target("sm_90")
    found: dict[str, list[str]] = {}
    for name, call in CALLS.items():
        wanted, failures = record({(name, str(seed)): partial(call, seed) for seed in SEEDS})
        assert not failures, failures
        found[name] = list(dict.fromkeys(item.launch for item in wanted))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
