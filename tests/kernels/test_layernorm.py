"""LayerNorm alone and after a fused residual sum, against float64: every dtype, short and long rows, any strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels import launch, norm, reference
from megalm.kernels.layernorm import layer_norm
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, fresh_seed, normal, poisoned

EPS = 1e-5
# rows of several programs that take several tiles each; one feature; rows in blocks with a last block that is not full
SHAPES = [(2, 70, 64), (51, 300), (7, 1), (3, 1, 4101)]


def vectors(features: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a weight near 1 and two biases."""
    return [normal(features, dtype=dtype, scale=0.3) + shift for shift in (1, 0, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, bias, _ = vectors(shape[-1], dtype)
    inputs = [normal(*shape, dtype=dtype, scale=2.0) + 1.0, weight, bias]
    with poisoned():
        assert_as_good_as_plain(
            lambda *a: layer_norm(*a, eps=EPS),
            lambda *a: reference.layer_norm(*a, eps=EPS),
            inputs,
            names=["x", "weight", "bias"],
            floor=1e-7 if shape[-1] > 1 else 1e-5,  # the sum of a single column may cancel
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_longer_than_65536(dtype: torch.dtype) -> None:
    weight = vectors(70_001, dtype)[0]
    with poisoned():
        assert_as_good_as_plain(
            lambda x, w: layer_norm(x, w, None, eps=EPS),
            lambda x, w: reference.layer_norm(x, w, None, eps=EPS),
            [normal(2, 70_001, dtype=dtype), weight],
            names=["x", "weight"],
        )


@pytest.mark.parametrize("features", [64, 2100])
def test_the_variance_is_right_far_from_zero(features: int) -> None:
    x = normal(3, features) + 1e4
    actual = layer_norm(x, torch.ones(features, device=DEVICE), None, eps=EPS).double()
    exact = reference.layer_norm(x.double(), torch.ones(features, device=DEVICE).double(), None, eps=EPS)
    # fp32 rounds the mean by up to 1e-3 standard deviations here; mean(x^2) - mean(x)^2 would be off by several
    assert float((actual - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dropout", "with_row_bias"),
    [
        ((2, 70, 64), 0.0, False),
        ((2, 20, 300), 0.0, True),
        ((3, 17, 36), 0.3, True),
        ((3, 17, 37), 0.3, True),
        ((2, 2, 2100), 0.2, True),
    ],
    ids=str,
)
def test_the_norm_of_a_sum(
    dtype: torch.dtype, shape: tuple[int, int, int], dropout: float, with_row_bias: bool
) -> None:
    seed = fresh_seed() + 2**63
    # element indices beyond 2^32; the part lies within samples of 2048 tokens
    options = {"eps": EPS, "dropout": dropout, "seed": seed, "dropout_origin": (2**21 + 3, 5, 2**11)}

    def run(function: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *row_bias: Tensor) -> Any:
        return function(x, weight, bias, residual=residual, row_bias=row_bias[0] if row_bias else None, **options)

    inputs = [*(normal(*shape, dtype=dtype) for _ in range(2)), *vectors(shape[-1], dtype)][: 4 + with_row_bias]
    with poisoned():
        assert_as_good_as_plain(
            lambda *a: run(layer_norm, *a),
            lambda *a: run(reference.layer_norm, *a),
            inputs,
            names=["x", "residual", "weight", "bias", "row_bias"][: len(inputs)],
        )


@pytest.mark.parametrize("features", [48, 2100])
def test_the_norm_is_that_of_the_sum_that_is_returned(features: int) -> None:
    x, residual = (normal(2, 3, features, dtype=torch.bfloat16) for _ in range(2))
    weight, bias, row_bias = vectors(features, torch.bfloat16)
    normed, total = layer_norm(
        x, weight, bias, eps=EPS, residual=residual, row_bias=row_bias, dropout=0.4, seed=fresh_seed()
    )
    assert torch.equal(normed, layer_norm(total, weight, bias, eps=EPS))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_outputs_may_go_unused(used: int) -> None:
    weight, bias, _ = vectors(36, torch.float32)
    assert_as_good_as_plain(
        lambda x, r: layer_norm(x, weight, bias, eps=EPS, residual=r, dropout=0.5, seed=3)[used],
        lambda x, r: reference.layer_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), eps=EPS, residual=r, dropout=0.5, seed=3
        )[used],
        [normal(2, 3, 36), normal(2, 3, 36)],
    )


def test_parameters_of_another_dtype_keep_theirs() -> None:
    weight, bias, row_bias = (v.requires_grad_() for v in vectors(64, torch.float32))
    x, residual = (normal(2, 3, 64, dtype=torch.bfloat16) for _ in range(2))
    options = {"eps": EPS, "residual": residual, "row_bias": row_bias}
    normed, total = layer_norm(x, weight, bias, **options)
    assert normed.dtype == total.dtype == torch.bfloat16
    gradients = torch.autograd.grad(normed.float().square().sum(), [weight, bias, row_bias])
    assert all(g.dtype == torch.float32 for g in gradients)
    wide = total.detach().double()
    expected = (wide - wide.mean(-1, keepdim=True)) / wide.std(-1, keepdim=True, correction=0) * weight + bias
    assert float(((normed - expected).norm() / expected.norm()).detach()) < 3e-3  # the rounding of bf16


@pytest.mark.parametrize("features", [40, 2100])
def test_strided_inputs_and_gradients(features: int) -> None:
    weight, bias, _ = (v.requires_grad_() for v in vectors(features, torch.float32))
    wide, turned = normal(3, 4, 2 * features), normal(4, 3, features).transpose(0, 1)
    for x, residual in ((wide[..., :features], turned), (turned, wide[..., 1 : features + 1])):
        pairs = []
        for a, b in ((x, residual), (x.contiguous(), residual.contiguous())):
            leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
            normed, total = layer_norm(leaves[0], weight, bias, eps=EPS, residual=leaves[1])
            stretched = torch.ones((), device=DEVICE).expand_as(normed)  # a gradient of stride 0
            given = [stretched, wide[..., ::2]]
            if a.is_contiguous():
                given = [dy.contiguous() for dy in given]
            pairs.append((normed, total, *torch.autograd.grad([normed, total], [*leaves, weight, bias], given)))
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)


def test_offsets_beyond_32_bits() -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # only three rows of it are touched
    x = memory.as_strided((3, 64), (2**30, 1))
    values = normal(3, 64, dtype=torch.bfloat16)
    x.copy_(values)
    weight, bias, _ = vectors(64, torch.bfloat16)
    assert torch.equal(layer_norm(x, weight, bias, eps=EPS), layer_norm(values, weight, bias, eps=EPS))


def test_empty_inputs() -> None:
    weight, bias, _ = (v.requires_grad_() for v in vectors(8, torch.float32))
    x = normal(0, 3, 8).requires_grad_()
    normed, total = layer_norm(x, weight, bias, eps=EPS, residual=x, dropout=0.1, seed=1)
    assert normed.shape == total.shape == x.shape
    (normed.sum() + total.sum()).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any() and bias.grad is not None and not bias.grad.any()
    assert layer_norm(normal(3, 0), normal(0), None, eps=EPS).shape == (3, 0)


def test_gradients_are_the_same_every_time() -> None:
    weight, bias, _ = (v.requires_grad_() for v in vectors(96, torch.bfloat16))
    x, dy = (normal(250, 96, dtype=torch.bfloat16) for _ in range(2))
    first, second = (torch.autograd.grad(layer_norm(x, weight, bias, eps=EPS), [weight, bias], dy) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_wrong_arguments_are_named() -> None:
    x, weight = normal(2, 3, 4), normal(4)
    for options, message in (
        ({"weight": normal(3)}, r"layer_norm: weight of shape \(3,\) for x \(2, 3, 4\); give \[D\]"),
        ({"bias": normal(1, 4)}, r"bias of shape \(1, 4\)"),
        ({"row_bias": weight}, r"row_bias or dropout=0\.0 without a residual"),
        ({"dropout": 0.1, "seed": 1}, r"dropout=0\.1 without a residual"),
        ({"residual": x.half()}, r"residual \(2, 3, 4\) torch\.float16 is unlike x"),
        (
            {"residual": x, "dropout": 0.1},
            r"dropout=0\.1 for x \(2, 3, 4\) and seed=None; give x \[B, T, D\] and a seed",
        ),
        ({"residual": x, "dropout": 1.0, "seed": 1}, r"dropout=1\.0 is no rate"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_norm(**{"x": x, "weight": weight, "bias": None, "eps": EPS, **options})  # type: ignore[arg-type]


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, bias, row_bias) = normal(2, 3, 8), vectors(8, torch.float32)
    options = {"eps": EPS, "residual": normal(2, 3, 8), "row_bias": row_bias, "dropout": 0.2, "seed": 1}
    expected = layer_norm(x, weight, bias, **options), layer_norm(x, weight, bias, eps=EPS)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(layer_norm(x, weight, bias, **options), expected[0])
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=EPS), expected[1])


def test_the_ops_are_good_citizens_of_torch() -> None:
    weight, bias, row_bias = (v.requires_grad_() for v in vectors(8, torch.float32))
    x, residual = (normal(2, 3, 8).requires_grad_() for _ in range(2))
    for given, rate in (((x, residual, row_bias, weight, bias), 0.2), ((x, None, None, weight, None), 0.0)):
        torch.library.opcheck(norm._forward_op, (*given, EPS, True, rate, 17, [0, 0, 3]))
    fixed = [t.detach() for t in (x, residual, x, weight, normal(6), normal(6))]
    torch.library.opcheck(norm._backward_op, (*fixed, torch.float32, None, torch.bfloat16, 0.2, 17, [0, 0, 3]))

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        normed, total = layer_norm(
            x, weight, bias, eps=EPS, residual=residual, row_bias=row_bias, dropout=0.2, seed=2**64 - 1
        )
        return normed.square().sum() + total.sin().sum() + layer_norm(x, weight, None, eps=EPS).sin().sum()

    leaves = [x, residual, weight, bias, row_bias]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(x, residual), leaves) for f in (compiled, loss))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 30 GB")
def test_tensors_of_more_than_2_31_elements() -> None:
    weight, bias, _ = vectors(4096, torch.bfloat16)
    x = torch.randn(2**19 + 8, 4096, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    y = layer_norm(x, weight, bias, eps=EPS)
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    last = x.detach()[-8:].clone().requires_grad_()
    y_last = layer_norm(last, weight, bias, eps=EPS)
    assert torch.equal(y[-8:], y_last)
    assert torch.equal(gradient[-8:], torch.autograd.grad(y_last, last, last.detach())[0])
