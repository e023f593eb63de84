"""RMSNorm alone and after a fused residual sum, against float64; what it shares with LayerNorm is tested there."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from megalm.kernels import launch, norm, reference
from megalm.kernels.rmsnorm import rms_norm
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, fresh_seed, normal, poisoned

EPS = 1e-5


def weight_of(features: int, dtype: torch.dtype) -> Tensor:
    return normal(features, dtype=dtype, scale=0.3) + 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 64), (51, 300), (7, 1), (3, 1, 4101)], ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    eps = 1.0 if shape[-1] == 1 else EPS  # the gradient of x / |x| is all rounding
    with poisoned():
        assert_as_good_as_plain(
            lambda *a: rms_norm(*a, eps=eps),
            lambda *a: reference.rms_norm(*a, eps=eps),
            [normal(*shape, dtype=dtype, scale=2.0) + 1.0, weight_of(shape[-1], dtype)],
            names=["x", "weight"],
            floor=1e-7 if shape[-1] > 1 else 1e-5,  # the sum of a single column may cancel
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dropout", "with_row_bias"),
    [((2, 70, 64), 0.0, False), ((3, 17, 37), 0.3, True), ((2, 2, 2100), 0.2, True)],
    ids=str,
)
def test_the_norm_of_a_sum(
    dtype: torch.dtype, shape: tuple[int, int, int], dropout: float, with_row_bias: bool
) -> None:
    options = {"eps": EPS, "dropout": dropout, "seed": fresh_seed(), "dropout_origin": (3, 5, 100)}

    def run(function: Any, x: Tensor, residual: Tensor, weight: Tensor, *row_bias: Tensor) -> Any:
        return function(x, weight, residual=residual, row_bias=row_bias[0] if row_bias else None, **options)

    inputs = [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), weight_of(shape[-1], dtype)]
    inputs += [normal(shape[-1], dtype=dtype)] * with_row_bias
    with poisoned():
        assert_as_good_as_plain(
            lambda *a: run(rms_norm, *a),
            lambda *a: run(reference.rms_norm, *a),
            inputs,
            names=["x", "residual", "weight", "row_bias"][: len(inputs)],
        )


def test_the_norm_is_that_of_the_sum_that_is_returned() -> None:
    x, residual = (normal(2, 3, 48, dtype=torch.bfloat16) for _ in range(2))
    weight = weight_of(48, torch.bfloat16)
    normed, total = rms_norm(x, weight, eps=EPS, residual=residual, dropout=0.4, seed=fresh_seed())
    assert torch.equal(normed, rms_norm(total, weight, eps=EPS))


def test_strided_and_empty_inputs_and_expanded_gradients() -> None:
    heads = normal(3, 4, 3, 2, 16)  # queries, keys and values side by side, as heads
    weight = weight_of(16, torch.float32)
    results = []
    for x in (heads[:, :, 1], heads[:, :, 1].contiguous()):
        leaf = x.detach().requires_grad_()
        y = rms_norm(leaf, weight, eps=EPS)
        y.sum().backward()
        results.append((y, leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert rms_norm(heads[:0], weight, eps=EPS).shape == (0, 4, 3, 2, 16)


def test_a_row_of_zeros_is_finite() -> None:
    x = torch.zeros(2, 24, device=DEVICE, requires_grad=True)
    y = rms_norm(x, weight_of(24, torch.float32), eps=EPS)
    y.sum().backward()
    assert not y.any() and x.grad is not None and x.grad.isfinite().all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: weight of shape \(3,\) for x \(2, 4\); give \[D\]"):
        rms_norm(normal(2, 4), normal(3), eps=EPS)
    with pytest.raises(ValueError, match=r"rms_norm: dropout=0\.1 for x \(2, 4\) and seed=1; give x \[B, T, D\]"):
        rms_norm(normal(2, 4), normal(4), eps=EPS, residual=normal(2, 4), dropout=0.1, seed=1)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(2, 3, 8), weight_of(8, torch.float32)
    options = {"eps": EPS, "residual": normal(2, 3, 8), "dropout": 0.2, "seed": 1}
    expected = rms_norm(x, weight, **options), rms_norm(x, weight, eps=EPS)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(rms_norm(x, weight, **options), expected[0])
    torch.testing.assert_close(rms_norm(x, weight, eps=EPS), expected[1])


def test_the_op_is_a_good_citizen_of_torch() -> None:
    x, weight = normal(2, 3, 8).requires_grad_(), weight_of(8, torch.float32).requires_grad_()
    torch.library.opcheck(norm._forward_op, (x, None, None, weight, None, EPS, False, 0.0, 0, [0, 0, 3]))

    def loss(x: Tensor) -> Tensor:
        return rms_norm(x, weight, eps=EPS, residual=x, dropout=0.2, seed=3)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(x), [x, weight]) for f in (compiled, loss))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_the_compiler_that_torch_uses_by_default_takes_the_op_and_its_gradient() -> None:
    if DEVICE.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler; there is no g++, and CXX names none")
    x, residual, weight = normal(2, 3, 8), normal(2, 3, 8), weight_of(8, torch.float32)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]

    def loss(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total = rms_norm(x, weight, eps=EPS, residual=residual, dropout=0.2, seed=2**63)
        return (normed * total.sin()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor")
    with torch._inductor.config.patch(force_disable_caches=True):  # they know nothing of the op's code
        actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
