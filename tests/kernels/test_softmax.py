"""The scaled masked softmax against float64: every dtype, masks that are broadcast, long rows, rows with nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels import launch, reference, softmax
from megalm.kernels.softmax import scaled_masked_softmax
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, normal, poisoned

# shape, shape of the mask: many short rows a program, T other than S, five dims and a mask that is copied, long rows
CASES = [
    ((2, 3, 20, 64), (2, 1, 1, 64)),
    ((2, 3, 7, 37), (2, 1, 7, 37)),
    ((2, 2, 37, 7), (7,)),
    ((2, 3, 2, 5, 9), (2, 1, 2, 1, 9)),
    ((3, 1), None),
    ((2, 3, 4101), (2, 3, 1)),
]


def some(*shape: int) -> Tensor:
    """Return a mask that hides about three of ten."""
    return normal(*shape) > -0.5


def assert_right(x: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
    """Compare with the oracle. Gradients have an allowance for dy - sum(dy y), which cancels where y is near 1.

    Each part of that difference may be wrong by two roundings: of 1/sum and of the product with it in fp32, of y in
    16 bits, from which the backward pass starts as torch.softmax's does. Over 400 draws of four shapes in each dtype
    the error beyond twice that of plain torch was 1.4 roundings at most in fp32, 0.2 in 16 bits.
    """
    dy = normal(*x.shape).to(x.dtype)
    y = reference.scaled_masked_softmax(x.double(), scale=scale, mask=mask, causal=causal)
    part, sums = y * dy.abs(), (y * dy).sum(-1, keepdim=True)
    parts = scale * (part + y * part.sum(-1, keepdim=True))
    gradient = scale * y * (dy - sums)
    floor = float(torch.finfo(x.dtype).eps * parts.norm() / (gradient.norm() or 1.0))
    with poisoned():
        assert_as_good_as_plain(
            lambda x: scaled_masked_softmax(x, scale=scale, mask=mask, causal=causal),
            lambda x: reference.scaled_masked_softmax(x, scale=scale, mask=mask, causal=causal),
            [x],
            output_gradients=[dy],
            gradient_floor=floor,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("shape", "mask_shape"), CASES, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, causal: bool, shape: tuple[int, ...], mask_shape: tuple[int, ...] | None
) -> None:
    mask = None if mask_shape is None else some(*mask_shape)
    assert_right(normal(*shape, dtype=dtype, scale=3.0), mask, causal, 0.7)


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_scales(scale: float) -> None:
    assert_right(normal(2, 9, 33, scale=3.0), None, True, scale)


def test_rows_longer_than_65536() -> None:
    assert_right(normal(2, 70_001, dtype=torch.bfloat16, scale=3.0), some(1, 70_001), True, 1.0)
    assert_right(normal(1, 70_001, scale=3.0), None, False, 1.0)


@pytest.mark.parametrize("keys", [20, 2100])
def test_rows_of_which_nothing_is_visible_are_zero(keys: int) -> None:
    mask = torch.ones(2, 1, 4, keys, dtype=torch.bool, device=DEVICE)
    mask[0, 0, 1] = False
    x = normal(2, 2, 4, keys).requires_grad_()
    with poisoned():
        y = scaled_masked_softmax(x, mask=mask)
        (gradient,) = torch.autograd.grad(y, x, normal(*x.shape))
    blind = ~mask.any(-1).expand(2, 2, 4)
    assert not y[blind].any() and not gradient[blind].any()
    torch.testing.assert_close(y[~blind].sum(-1), torch.ones_like(y[~blind][:, 0]))
    tall = scaled_masked_softmax(normal(40, 4), causal=True)  # the first 36 rows end before the first key
    assert not tall[:36].any() and tall.isfinite().all()


@pytest.mark.parametrize("keys", [40, 2100])
def test_what_is_hidden_counts_for_nothing(keys: int) -> None:
    x, dy = normal(1, 5, keys), normal(1, 5, keys)
    future = torch.ones(5, keys, dtype=torch.bool, device=DEVICE).triu(keys - 4)
    spoilt, dy_spoilt = (t.masked_fill(future, torch.nan) for t in (x, dy))
    results = []
    for value, gradient in ((x, dy), (spoilt, dy_spoilt)):
        leaf = value.requires_grad_()
        y = scaled_masked_softmax(leaf, causal=True)
        results.append((y, *torch.autograd.grad(y, leaf, gradient)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    masked = scaled_masked_softmax(spoilt.detach(), mask=~future)
    assert torch.equal(masked, results[0][0])


@pytest.mark.parametrize("keys", [40, 2100])
def test_large_numbers_and_nan(keys: int) -> None:
    x = torch.full((4, keys), -6e4, dtype=torch.float16, device=DEVICE)
    x[0, 3], x[1, 5], x[2, 7] = 6e4, -torch.inf, torch.nan
    y = scaled_masked_softmax(x, scale=8.0).float()
    assert y[0, 3] == 1.0 and y[0].sum() == 1.0
    assert y[1, 5] == 0.0 and y[1].isfinite().all() and abs(y[1].sum() - 1.0) < 2e-3
    assert y[2].isnan().all() and y[3].isfinite().all()


@pytest.mark.parametrize("keys", [24, 2100])
def test_strided_inputs_masks_and_gradients(keys: int) -> None:
    wide = normal(2, 2, 1 + 60 // keys, 2 * keys)
    mask = some(2, 2 * keys)[:, None, None, ::2]
    for x in (wide[..., :keys], wide[..., ::2], wide.transpose(1, 2)[..., 1 : keys + 1]):
        results = []
        for value, visible in ((x, mask), (x.contiguous(), mask.expand(x.shape).contiguous())):
            leaf = value.detach().requires_grad_()
            y = scaled_masked_softmax(leaf, mask=visible)
            results.append((y, *torch.autograd.grad(y[..., 0].sum(), leaf)))
            stretched = torch.ones((), device=DEVICE).expand_as(y)
            assert torch.autograd.grad(scaled_masked_softmax(leaf, mask=visible), leaf, stretched)[0].abs().max() < 1e-6
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_offsets_beyond_32_bits() -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # only three rows of it are touched
    values = normal(3, 1, 64, dtype=torch.bfloat16)
    x = memory.as_strided((3, 1, 64), (2**30, 64, 1))
    x.copy_(values)
    assert torch.equal(scaled_masked_softmax(x), scaled_masked_softmax(values))


def test_empty_inputs() -> None:
    for shape in ((2, 0, 5), (2, 3, 0), (0, 4, 4)):
        x = normal(*shape).requires_grad_()
        y = scaled_masked_softmax(x, mask=some(1, shape[-1]), causal=True)
        y.sum().backward()
        assert y.shape == shape and x.grad is not None and x.grad.shape == shape


def test_wrong_arguments_are_named() -> None:
    x = normal(2, 3, 4)
    with pytest.raises(ValueError, match=r"scaled_masked_softmax of x \(4,\); give \[\.\.\., T, S\]"):
        scaled_masked_softmax(normal(4))
    for mask in (some(3, 3), some(1, 2, 3, 4), normal(3, 4)):
        with pytest.raises(ValueError, match=r"x \(2, 3, 4\) with mask .*; give a bool mask that broadcasts to x"):
            scaled_masked_softmax(x, mask=mask)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = normal(2, 3, 8), some(3, 8)
    expected = scaled_masked_softmax(x, scale=0.3, mask=mask, causal=True)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(scaled_masked_softmax(x, scale=0.3, mask=mask, causal=True), expected)


def test_the_ops_are_good_citizens_of_torch() -> None:
    x, mask = normal(2, 3, 8).requires_grad_(), some(2, 1, 8)
    torch.library.opcheck(softmax._forward_op, (x, mask, 0.5, True))
    torch.library.opcheck(softmax._backward_op, (x.detach(), x.detach(), 0.5, True))

    def loss(x: Tensor) -> Tensor:
        return scaled_masked_softmax(x, scale=0.5, mask=mask, causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 30 GB")
def test_tensors_of_more_than_2_31_elements() -> None:
    x = torch.randn(130, 4096, 4096, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    y = scaled_masked_softmax(x, causal=True)
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    last = x.detach()[-1].clone().requires_grad_()
    y_last = scaled_masked_softmax(last, causal=True)
    assert torch.equal(y[-1], y_last)
    assert torch.equal(gradient[-1], torch.autograd.grad(y_last, last, last.detach())[0])
