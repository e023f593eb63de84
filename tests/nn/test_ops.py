"""Both implementations of every operation of the model compute the same, dropout masks included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.errors import ConfigError
from megalm.nn.masks import Documents, Drop, DropoutKeys, Site, document_starts
from megalm.nn.ops import (
    REFERENCE,
    Operations,
    fused_operations,
    select_operations,
)
from tests.shards import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = 2e-6
"""fp32: some roundings of inputs, products and sums of a few dozen terms."""

TOKEN_DROP = Drop(rate=0.3, site=Site("blocks.1.mlp"), keys=DropoutKeys(7, 2, first_sample=2), first=3, whole=9)
HEAD_DROP = Drop(rate=0.3, site=Site("blocks.1.mlp"), keys=DropoutKeys(7, 2, first_sample=2), first=4, whole=8)
assert TOKEN_DROP.stream >= 2**63, "kernels take the key as signed"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


NUMBERS_BT = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 4, 4, 4, 4, 4]], device=DEVICE)
DOCUMENTS = Documents(NUMBERS_BT, document_starts(NUMBERS_BT))
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0], device=DEVICE)


def attention(name: str, drop: Drop | None = None, **options: Any) -> Callable[[Operations, list[Tensor]], Any]:
    def call(operations: Operations, x: list[Tensor]) -> Tensor:
        more = {"bias_HTS": x[3]} if len(x) > 3 else {}
        result = getattr(operations, name)(*x[:3], causal=True, drop=drop, **more, **options)
        return torch.cat((result[0].flatten(), result[1].flatten())) if options.get("return_lse") else result

    return call


def cross_entropy(operations: Operations, x: list[Tensor]) -> Tensor:
    targets = torch.tensor([0, 5, -1, 6, 3], device=DEVICE)
    top, total, target, logits = operations.cross_entropy_statistics(x[0].detach(), targets, 7)
    lse = top + total.log()
    gradient = x[0].detach().clone()
    operations.cross_entropy_gradient_(gradient, targets, lse, torch.ones_like(lse), columns=7, vocab=7)
    return torch.cat((torch.stack((lse, target, logits), 1), gradient), 1)


def linear_cross_entropy(operations: Operations, x: list[Tensor]) -> Tensor:
    targets = torch.tensor([0, 5, -1, 6, 3], device=DEVICE)
    x = [t.detach() for t in x]
    top, total, target, logits = operations.linear_cross_entropy_statistics(*x, targets, 7)
    lse = top + total.log()
    gradients = operations.linear_cross_entropy_gradients(*x, targets, lse, torch.ones_like(lse), columns=7, vocab=7)
    return torch.cat((torch.stack((lse, target, logits), 1).flatten(), *(g.flatten() for g in gradients)))


def adamw(operations: Operations, x: list[Tensor]) -> Tensor:
    weight, gradient = (t.detach().clone() for t in x)
    average, square = torch.zeros_like(weight), torch.zeros_like(weight)
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for step in (1, 2):
        operations.adamw_([weight], [gradient], [average], [square], step=step, **options)
    return weight


X_BTD, HEADS, KEYS = (2, 6, 8), (2, 6, 4, 16), (2, 6, 2, 16)
CHANGES: dict[str, dict[str, Any]] = {
    "in a window": {"window": 2},
    "capped and biased": {"softcap": 2.0, "slopes_H": SLOPES},
    "of documents": {"documents": DOCUMENTS},
    "of documents in windows with lse": {"documents": DOCUMENTS, "window": 3, "return_lse": True, "slopes_H": SLOPES},
}
ATTENTION = {
    f"{name} {change}": ((HEADS, KEYS, KEYS), attention(name, **options))
    for name in ("flash_attention", "unfused_attention")
    for change, options in CHANGES.items()
}
CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[[Operations, list[Tensor]], Any]]] = {
    **ATTENTION,
    "flash_attention with a learned bias": ((HEADS, KEYS, KEYS, (4, 6, 6)), attention("flash_attention")),
    "unfused_attention with a learned bias": ((HEADS, KEYS, KEYS, (4, 6, 6)), attention("unfused_attention")),
    "flash_attention": ((HEADS, KEYS, KEYS), attention("flash_attention", None)),
    "flash_attention dropping": ((HEADS, KEYS, KEYS), attention("flash_attention", HEAD_DROP)),
    "unfused_attention": ((HEADS, KEYS, KEYS), attention("unfused_attention", None)),
    "unfused_attention dropping": ((HEADS, KEYS, KEYS), attention("unfused_attention", HEAD_DROP)),
    "layer_norm": ((X_BTD, (8,), (8,)), lambda o, x: o.layer_norm(*x, eps=1e-5)),
    "layer_norm of a sum": (
        (X_BTD, (8,), (8,), X_BTD),
        lambda o, x: torch.cat(o.layer_norm(*x[:3], eps=1e-5, residual=x[3], drop=TOKEN_DROP)),
    ),
    "rms_norm": ((X_BTD, (8,)), lambda o, x: o.rms_norm(*x, eps=1e-5)),
    "rms_norm of a sum": (
        (X_BTD, (8,), X_BTD),
        lambda o, x: torch.cat(o.rms_norm(*x[:2], eps=1e-5, residual=x[2], drop=TOKEN_DROP)),
    ),
    "dropout": ((X_BTD, X_BTD), lambda o, x: o.dropout(x[0], TOKEN_DROP, residual=x[1])),
    "dropout of nothing": ((X_BTD, X_BTD), lambda o, x: o.dropout(x[0], None, residual=x[1])),
    "apply_rotary": ((HEADS, (6, 16), (6, 16)), lambda o, x: o.apply_rotary(x[0], x[1].detach(), x[2].detach())),
    "gelu": ((X_BTD,), lambda o, x: o.gelu(x[0])),
    "geglu": ((X_BTD,), lambda o, x: o.geglu(x[0])),
    "swiglu": ((X_BTD,), lambda o, x: o.swiglu(x[0])),
    "embedding": (((11, 8),), lambda o, x: o.embedding(torch.tensor([[1, 10, 1], [0, 1, 3]], device=DEVICE), x[0])),
    "cross_entropy_statistics, cross_entropy_gradient_": (((5, 9),), cross_entropy),
    "linear_cross_entropy_statistics, linear_cross_entropy_gradients": (((5, 8), (9, 8)), linear_cross_entropy),
    "grouped_matmul": (
        ((9, 8), (4, 5, 8)),
        lambda o, x: o.grouped_matmul(x[0], x[1], torch.tensor([3, 0, 5, 1], device=DEVICE)),
    ),
    "adamw_": ((X_BTD, X_BTD), adamw),
    "grad_norm": ((X_BTD, HEADS), lambda o, x: o.grad_norm([t.detach() for t in x], squared=True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_and_plain_torch_compute_the_same(name: str) -> None:
    shapes, call = CALLS[name]
    results = []
    for operations in (fused_operations(), REFERENCE):
        inputs = [random(*shape, seed=number).requires_grad_() for number, shape in enumerate(shapes)]
        y = call(operations, inputs)
        gradients = [torch.zeros_like(x) for x in inputs]
        if y.requires_grad:
            given = torch.autograd.grad(y, inputs, random(*y.shape, seed=9), allow_unused=True)
            gradients = [g if g is not None else x for g, x in zip(given, gradients, strict=True)]
        results.append([y.detach(), *gradients])
    for fused, plain in zip(*results, strict=True):
        assert_close(fused, plain, name, LIMIT)


@pytest.mark.parametrize("change", CHANGES)
def test_attention_with_and_without_the_whole_matrix_is_the_same(change: str) -> None:
    x = [random(*shape, seed=number).double() for number, shape in enumerate((HEADS, KEYS, KEYS))]
    one, other = (attention(name, **CHANGES[change])(REFERENCE, x) for name in ("flash_attention", "unfused_attention"))
    assert_close(one, other, change)


def test_every_operation_is_compared() -> None:
    compared = {part for name in CALLS for part in name.replace(",", "").split()}
    assert {field.name for field in fields(Operations)} - {"widest_head"} <= compared


def test_the_device_chooses_and_the_recipe_may_overrule_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert select_operations("auto", cpu) is REFERENCE
    assert select_operations("reference", cuda) is REFERENCE
    assert select_operations("auto", cuda) is fused_operations()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"model\.kernels=fused needs a CUDA device .* on cpu; use auto"):
        select_operations("fused", cpu)
