"""The plain-torch operations against their formulas in float64, and what they keep in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalm.kernels import reference
from tests.shards import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropped: Tensor | None) -> Tensor:
    """Return attention as BTHE, one row and head at a time."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            shared = head // (q.shape[2] // k.shape[2])
            scores = q[row, :, head] @ k[row, :, shared].T * scale
            if causal:
                scores = scores + torch.full_like(scores, -math.inf).triu(1)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            if dropped is not None:
                weights = weights * dropped[row, head]
            out[row, :, head] = weights @ v[row, :, shared]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_softmax_times_values(groups: int, causal: bool, dropout: bool, scale: float | None) -> None:
    q, k, v = random(2, 5, 4, 6), random(2, 5, groups, 6, seed=1), random(2, 5, groups, 6, seed=2)
    dropped = (random(2, 4, 5, 5, seed=3) > 0).double() * 2.0 if dropout else None
    actual = reference.flash_attention(q, k, v, causal=causal, scale=scale, dropout_scale_BHTS=dropped)
    expected = plain_attention(q, k, v, causal, 6**-0.5 if scale is None else scale, dropped)
    assert_close(actual, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_with_nothing_dropped_has_the_gradients_of_attention_without_dropout(groups: int) -> None:
    shapes = ((2, 3, 2, 4), (2, 3, groups, 4), (2, 3, groups, 4))
    gradients = []
    for scale in (None, torch.ones(2, 2, 3, 3, dtype=torch.float64)):
        inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        out = reference.flash_attention(*inputs, causal=True, dropout_scale_BHTS=scale)
        gradients.append(torch.autograd.grad(out, inputs, random(2, 3, 2, 4, seed=9)))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_part_of_attention_are_rounded_once(dtype: torch.dtype) -> None:
    q, k, v, dout = (random(2, 7, heads, 16, seed=seed).to(dtype) for seed, heads in enumerate((4, 2, 2, 4)))
    out, lse = reference.flash_attention(q, k, v, causal=True, return_lse=True)
    found = reference.flash_attention_gradients(dout, None, out, lse, q, k, v, causal=True)
    wide = [x.float() for x in (dout, out, q, k, v)]
    expected = reference.flash_attention_gradients(wide[0], None, wide[1], lse, *wide[2:], causal=True)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert one.dtype is dtype and torch.equal(one, other.to(dtype))


def test_norms_are_their_formulas() -> None:
    x, weight, bias = random(3, 4, 7) + 2.0, random(7, seed=1), random(7, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    plain = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    assert_close(reference.layer_norm(x, weight, bias, eps=0.1), plain + bias)
    assert_close(reference.layer_norm(x, weight, None, eps=0.1), plain)
    root = (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert_close(reference.rms_norm(x, weight, eps=0.1), x / root * weight)


def test_rotary_turns_pairs_half_a_head_apart() -> None:
    x_BTHE, angles_TE = random(2, 3, 2, 8), random(3, 4, seed=1)
    both = torch.cat((angles_TE, angles_TE), dim=1)
    turned = reference.apply_rotary(x_BTHE, both.cos(), both.sin())
    numbers = torch.complex(x_BTHE[..., :4], x_BTHE[..., 4:]) * torch.exp(1j * angles_TE)[:, None, :]
    assert_close(turned, torch.cat((numbers.real, numbers.imag), dim=-1))


def test_activations_are_their_formulas() -> None:
    x, y = 3.0 * random(5, 7), random(5, 7, seed=1)
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    assert_close(reference.gelu(x), 0.5 * x * (1.0 + inner.tanh()))
    assert_close(reference.swiglu(x, y), x / (1.0 + (-x).exp()) * y)


def every_result(dtype: torch.dtype) -> dict[str, Tensor]:
    x, y, weight = (random(2, 3, 2, 4, seed=i).to(dtype).transpose(0, 1) for i in range(3))
    flat = weight.flatten()[:4]
    mask = torch.ones(3, 2, 2, 2, dtype=dtype)
    tables = [random(2, 4, seed=i).float() for i in (5, 6)]  # [T, E] with T the dim 1 of x, in fp32 as the model has
    return {
        "attention": reference.flash_attention(x, y, weight, causal=True),
        "attention with dropout": reference.flash_attention(x, y, weight, causal=True, dropout_scale_BHTS=mask),
        "layer_norm": reference.layer_norm(x, flat, flat, eps=1e-5),
        "rms_norm": reference.rms_norm(x, flat, eps=1e-5),
        "rotary": reference.apply_rotary(x, *tables),
        "gelu": reference.gelu(x),
        "swiglu": reference.swiglu(x, y),
    }


def test_grouped_products_are_a_product_a_row_and_their_gradients_those_of_autograd() -> None:
    expert_of_row = torch.tensor([0, 0, 2, 2, 2, 3])  # nobody's row follows
    counts = torch.bincount(expert_of_row, minlength=5)
    leaves = [random(7, 3).requires_grad_(), random(5, 4, 3, seed=1).requires_grad_()]

    def by_row(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        rows = [weight[expert] @ row for expert, row in zip(expert_of_row, x, strict=False)]
        return torch.stack([*rows, torch.zeros(4, dtype=x.dtype)])

    (y, *gradients), (expected, *right) = (
        (y, *torch.autograd.grad(y, leaves, random(7, 4, seed=2)))
        for y in (function(*leaves, counts) for function in (reference.grouped_matmul, by_row))
    )
    assert_close(y, expected)
    for gradient, wanted in zip(gradients, right, strict=True):
        assert_close(gradient, wanted)
    with pytest.raises(RuntimeError, match="non-negative"):
        reference.grouped_matmul(leaves[0][:5], leaves[1], counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_keep_the_dtype_and_its_precision_on_strided_inputs(dtype: torch.dtype) -> None:
    """The limit is a few roundings of input, weights and result: 8 of the dtype's epsilon."""
    limit = 8 * torch.finfo(dtype).eps
    exact = every_result(torch.float64)
    for name, result in every_result(dtype).items():
        assert result.dtype is dtype, name
        assert_close(result.double(), exact[name], name, limit)
