"""Cross-entropy kernels against the formula in float64: one shard, several, and the whole vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalm.kernels import cross_entropy as file
from megalm.kernels import launch, reference
from megalm.kernels.cross_entropy import cross_entropy, cross_entropy_gradient_, cross_entropy_statistics
from tests.kernels.checks import (
    DEVICE,
    DTYPES,
    assert_as_good_as_plain,
    assert_error_at_most_twice,
    fresh_seed,
    normal,
    poisoned,
)

# The interpreter is numpy, which warns where tests want infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(All-NaN slice|overflow|invalid value) encountered:RuntimeWarning")

# Few elements, those of great probability, make the norm of a gradient, so that its error is a matter of luck: in 40
# draws of three rows in fp32 it was 0.7e-7 on the average and 2.1e-7 at most (plain torch: 1.3e-7 and 2.9e-7).
ROUNDINGS = 4e-7

OPTIONS: dict[str, float] = {"label_smoothing": 0.1, "z_loss": 1e-2}


def targets(rows: int, vocab: int) -> Tensor:
    """Return int64 targets: the first and the last index, an ignored one in between if there is room, others random."""
    drawn = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(fresh_seed()))
    drawn[0], drawn[-1] = 0, vocab - 1
    if rows > 2:
        drawn[1] = -100
    return drawn.to(DEVICE)


def placed(x_NV: Tensor, stride: int, offset: int) -> Tensor:
    """Return a copy of the rows at a row stride and an offset within memory that is NaN elsewhere."""
    memory = x_NV.new_full((x_NV.shape[0] * stride + offset,), math.nan)
    rows = memory.as_strided(x_NV.shape, (stride, 1), offset)
    return rows.copy_(x_NV)


def gradients(losses_of: Any, x: Tensor, dlosses: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(losses_of(x), x, dlosses)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab", "options"),
    [(5, 1000, {}), (6, 3077, OPTIONS), (1, 1, OPTIONS), (9, 2048, {"z_loss": 0.1}), (9, 15, {"label_smoothing": 0.5})],
)
def test_losses_and_gradients(dtype: torch.dtype, rows: int, vocab: int, options: dict[str, float]) -> None:
    """3077 is odd and longer than a tile: rows begin anywhere between two borders of 16 bytes."""
    with poisoned():
        assert_as_good_as_plain(
            lambda x, t: cross_entropy(x.clone(), t, **options),  # the clone is overwritten in place of the input
            lambda x, t: reference.cross_entropy(x, t, **options),
            [normal(rows, vocab, dtype=dtype, scale=3.0), targets(rows, vocab)],
            names=["logits"],
            floor=ROUNDINGS,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "offset"), [(1600, 0), (1600, 5), (1601, 1), (2304, 8)])
def test_rows_apart_anywhere_in_memory_give_the_same_and_what_lies_between_stays(
    dtype: torch.dtype, stride: int, offset: int
) -> None:
    plain, t = normal(3, 1600, dtype=dtype), targets(3, 1600)
    x, dlosses = placed(plain, stride, offset), normal(3)
    expected = cross_entropy(plain, t, **OPTIONS)
    torch.testing.assert_close(cross_entropy(x, t, **OPTIONS), expected, rtol=1e-6, atol=1e-6)
    dx = gradients(lambda x: cross_entropy(x, t, **OPTIONS), x, dlosses)
    exact = gradients(lambda x: reference.cross_entropy(x, t, **OPTIONS), plain.double(), dlosses.double())
    usual = gradients(lambda x: reference.cross_entropy(x, t, **OPTIONS), plain, dlosses)
    assert_error_at_most_twice("gradient", dx, usual, exact, ROUNDINGS)
    memory = torch.tensor([], dtype=dtype, device=DEVICE).set_(x.untyped_storage())
    assert memory.isnan().sum() == memory.numel() - x.numel(), "the gradient was written beside the rows"


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_logits_that_are_no_rows_are_copied(layout: str) -> None:
    x = normal(7, 5).t() if layout == "transposed" else normal(7).expand(5, 7)
    t, before = targets(5, 7), x.clone()
    losses, expected = cross_entropy(x, t), reference.cross_entropy(x, t)
    torch.testing.assert_close(losses, expected)
    leaf = x.detach().requires_grad_()
    cross_entropy(leaf, t).sum().backward()  # the gradient of a sum is expanded
    torch.testing.assert_close(
        leaf.grad, gradients(lambda x: reference.cross_entropy(x, t), x, torch.ones_like(losses))
    )
    assert torch.equal(leaf, before)


def test_ignored_rows_and_no_rows() -> None:
    x = normal(4, 9)
    for ignore_index in (-100, 3):
        t = torch.full((4,), ignore_index, device=DEVICE)
        assert torch.equal(cross_entropy(x, t, ignore_index=ignore_index, **OPTIONS), torch.zeros(4, device=DEVICE))
        dx = gradients(lambda y, t=t, i=ignore_index: cross_entropy(y.clone(), t, ignore_index=i), x, normal(4))
        assert torch.equal(dx, torch.zeros_like(x))
    empty = x[:0].clone().requires_grad_()
    losses = cross_entropy(empty, t[:0])
    losses.sum().backward()
    assert losses.shape == (0,) and empty.grad is not None and empty.grad.shape == (0, 9)


def test_huge_logits_do_not_overflow_and_keep_their_precision() -> None:
    x = 1e4 * torch.sign(normal(4, 1500)) + normal(4, 1500)
    x[1, 7:] = -math.inf
    t = torch.tensor([5, 3, 8, 1499], device=DEVICE)
    assert_as_good_as_plain(
        lambda x, t: cross_entropy(x.clone(), t), lambda x, t: reference.cross_entropy(x, t), [x, t], names=["logits"]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_or_target_gives_nan_in_its_row_alone(bad: float) -> None:
    x, t = normal(4, 1100), targets(4, 1100)
    t[0] = 1100
    x[2, 1050] = bad
    for function in (cross_entropy, reference.cross_entropy):
        leaf = x.clone().requires_grad_()
        losses = function(leaf, t)
        losses.sum().backward()
        assert losses.isnan().tolist() == [True, False, True, False]
        assert leaf.grad is not None and leaf.grad.isnan().any(dim=1).tolist() == [True, False, True, False]


def whole_from_shards(x: Tensor, t: Tensor, shards: list[tuple[int, int]], dlosses: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and gradient from shards (first column, columns) of the row, each with NaN as padding."""
    width, vocab = max(columns for _, columns in shards) + 3, x.shape[1]
    parts = []
    for first, columns in shards:
        part = x.new_full((x.shape[0], width), math.nan)
        part[:, :columns] = x[:, first : first + columns]
        parts.append((part, t - first, columns))
    statistics = [cross_entropy_statistics(*part) for part in parts]
    maxima, sums, target_logits, logit_sums = (torch.stack(values) for values in zip(*statistics, strict=True))
    top = maxima.amax(dim=0)
    losses, lse, rest = reference.cross_entropy_losses(
        top,
        (sums * (maxima - top).exp()).sum(dim=0),
        target_logits.sum(dim=0),
        logit_sums.sum(dim=0),
        vocab=vocab,
        **OPTIONS,
    )
    for part, local, columns in parts:
        cross_entropy_gradient_(part, local, lse, dlosses, columns=columns, vocab=vocab, lse_rest_N=rest, **OPTIONS)
        assert torch.equal(part[:, columns:], torch.zeros_like(part[:, columns:]))
    return losses, torch.cat([part[:, :columns] for part, _, columns in parts], dim=1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_shards_give_what_the_whole_gives(dtype: torch.dtype) -> None:
    """Targets on both sides of each border; the last shard is all padding; fp64 has no kernel."""
    x, t = normal(6, 2500, dtype=dtype, scale=2.0), torch.tensor([0, 1024, 1025, 2048, 2499, 7], device=DEVICE)
    dlosses = normal(6).to(torch.promote_types(dtype, torch.float32))
    dlosses[5] = 0.0
    losses, dx = whole_from_shards(x, t, [(0, 1025), (1025, 1475), (2500, 0)], dlosses)
    exact, plain = x.double().requires_grad_(), x.clone().requires_grad_()
    right, usual = (reference.cross_entropy(y, t, **OPTIONS) for y in (exact, plain))
    (right_dx,) = torch.autograd.grad(right, exact, dlosses.double())
    (usual_dx,) = torch.autograd.grad(usual, plain, dlosses)
    floor = 1e-14 if dtype is torch.float64 else ROUNDINGS  # some tens of roundings of fp64
    assert_error_at_most_twice("losses", losses, usual.detach(), right.detach(), floor)
    assert_error_at_most_twice("gradient", dx, usual_dx, right_dx, floor)
    assert torch.equal(dx[5], torch.zeros_like(dx[5]))


def test_rows_without_gradient_become_zero_whatever_they_hold() -> None:
    x = normal(2, 1300)
    x[1] = math.nan
    lse, grads = torch.tensor([3.0, math.nan], device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    for dtype in (torch.float32, torch.float64):
        y = x.to(dtype, copy=True)
        cross_entropy_gradient_(y, torch.tensor([4, 5], device=DEVICE), lse, grads, columns=1200, vocab=1200)
        assert torch.equal(y[1], torch.zeros_like(y[1])) and y[0].isfinite().all()
        torch.testing.assert_close(y[0, :4], (x[0, :4].to(dtype) - 3.0).exp())


def test_the_gradient_lies_in_the_logits_memory_and_torch_refuses_to_read_the_logits_again() -> None:
    x, t = normal(3, 40).requires_grad_(), targets(3, 40)
    logits = 2.0 * x
    places: list[int] = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    losses = cross_entropy(logits, t)
    losses.sum().backward(retain_graph=True)
    assert places == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(x.exp(), t).sum().backward()  # the backward pass of exp reads its result


def test_a_second_derivative_is_refused_not_taken_for_zero() -> None:
    x = normal(3, 40).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cross_entropy(x, targets(3, 40)).sum(), x, create_graph=True)


def test_offsets_beyond_32_bits_are_not_cut_off() -> None:
    """Two rows at a distance of more than 2^31 elements; memory that is not touched takes no room on a CPU.

    Of both tensors all rows begin at a 16-byte border, for lanes that begin elsewhere sum in another order.
    """
    stride, columns = 2**31 + 24, 1104
    memory = torch.empty(stride + columns, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((2, columns), (stride, 1), 0)
    near, t = normal(2, columns, dtype=torch.float16), targets(2, columns)
    far.copy_(near)
    far.requires_grad_()
    losses = cross_entropy(far, t)
    assert torch.equal(losses, cross_entropy(near, t))
    losses.sum().backward()
    assert torch.equal(far.detach(), gradients(lambda x: cross_entropy(x, t), near, torch.ones_like(losses)))


def test_wrong_arguments_are_named() -> None:
    x, t = normal(3, 8), targets(3, 8)
    with pytest.raises(ValueError, match=r"logits torch\.float32 of shape \(3, 8\) with targets of shape \(2,\).*give"):
        cross_entropy(x, t[:2])
    with pytest.raises(ValueError, match=r"torch\.int32 targets; give int64"):
        cross_entropy(x, t.int())
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0 is no share"):
        cross_entropy(x, t, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"z_loss=-1\.0 is no coefficient"):
        cross_entropy(x, t, z_loss=-1.0)
    with pytest.raises(ValueError, match=r"columns=9 of 8; use 0 to 8"):
        cross_entropy_statistics(x, t, 9)
    with pytest.raises(ValueError, match=r"strides \(1, 3\) cannot be overwritten"):
        cross_entropy_gradient_(normal(8, 3).t(), t, t.float(), t.float(), columns=8, vocab=8)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, dlosses = normal(3, 30), targets(3, 30), normal(3)
    losses = cross_entropy(x, t, **OPTIONS)
    dx = gradients(lambda y: cross_entropy(y.clone(), t, **OPTIONS), x, dlosses)
    shards = whole_from_shards(x, t.clamp_min(0), [(0, 20), (20, 10)], dlosses)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(cross_entropy(x, t, **OPTIONS), losses)
    torch.testing.assert_close(gradients(lambda y: cross_entropy(y, t, **OPTIONS), x, dlosses), dx)
    torch.testing.assert_close(whole_from_shards(x, t.clamp_min(0), [(0, 20), (20, 10)], dlosses), shards)


def test_the_ops_are_good_citizens_of_torch() -> None:
    t, row = targets(3, 40), normal(3)
    torch.library.opcheck(file._cross_entropy_op, (normal(3, 40).requires_grad_(), t, -100, 0.1, 0.01))
    torch.library.opcheck(file._statistics_op, (normal(3, 40), t, 39))
    torch.library.opcheck(file._gradient_op_, (normal(3, 40), t, row, row, row, 39, 39, 0.1, 0.01))


@pytest.mark.parametrize("logits_are_an_input", [True, False])
def test_compiled_and_checkpointed_gradients_are_those_of_eager(logits_are_an_input: bool) -> None:
    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x if logits_are_an_input else 2.0 * x, t, **OPTIONS).square().sum()

    x, t = normal(3, 40), targets(3, 40)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled, lambda x: checkpoint(loss, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        results.append(leaf.grad)
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="large shapes need a GPU")
@pytest.mark.parametrize("vocab", [128256, 50257])
def test_large_vocabularies(vocab: int) -> None:
    assert_as_good_as_plain(
        lambda x, t: cross_entropy(x.clone(), t, **OPTIONS),
        lambda x, t: reference.cross_entropy(x, t, **OPTIONS),
        [normal(512, vocab, dtype=torch.bfloat16, scale=3.0), targets(512, vocab)],
    )


@pytest.mark.parametrize("gradient_", [reference.cross_entropy_gradient_, cross_entropy_gradient_])
def test_what_fp16_could_not_hold_of_probabilities_survives_under_a_loss_scale(gradient_: Any) -> None:
    """A probability of 1e-8 is 0 in fp16; times a scale of 2^16 it is a number like another."""
    scale, rest = 65536.0, -18.4
    logits = torch.full((3, 40), rest, dtype=torch.float16, device=DEVICE)
    logits[:, 5] = 0.0
    exact = logits.double()
    lse_N = exact.logsumexp(1).float()
    target_N = torch.tensor([5, 5, 5], device=DEVICE)
    expected = scale * torch.softmax(exact, 1)
    expected[:, 5] -= scale
    assert float(torch.softmax(exact, 1)[0, 0].half()) == 0.0
    nothing = torch.zeros_like(lse_N)
    gradient_(logits, target_N, lse_N, torch.full_like(lse_N, scale), columns=40, vocab=40, lse_rest_N=nothing)
    others = [column for column in range(40) if column != 5]
    torch.testing.assert_close(logits.double()[:, others], expected[:, others], rtol=2e-3, atol=0.0)
