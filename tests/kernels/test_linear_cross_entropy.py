"""The head's product fused with its cross-entropy: as right as whole logits, with 1/16 of the memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalm.kernels import launch, reference
from megalm.kernels import linear_cross_entropy as file
from megalm.kernels.cross_entropy import cross_entropy_gradient_
from megalm.kernels.linear_cross_entropy import (
    block_columns,
    linear_cross_entropy,
    linear_cross_entropy_gradients,
    linear_cross_entropy_statistics,
)
from tests.kernels.checks import (
    DEVICE,
    DTYPES,
    RUN_SEED,
    assert_as_good_as_plain,
    assert_error_at_most_twice,
    fresh_seed,
    normal,
    poisoned,
)

# The interpreter is numpy, which warns where tests want infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value) encountered:RuntimeWarning")

OPTIONS: dict[str, float] = {"label_smoothing": 0.1, "z_loss": 1e-2}
ROUNDINGS = 4e-7  # as in test_cross_entropy.py


def inputs(rows: int, features: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and targets: both sides of the border of two blocks, the last index, others random."""
    hidden, weight = normal(rows, features, dtype=dtype), normal(vocab, features, dtype=dtype, scale=features**-0.5)
    drawn = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(fresh_seed()))
    placed = [target for target in (vocab - 1, -100, 0, 1023, 1024) if target < vocab]
    drawn[: len(placed)] = torch.tensor(placed)[:rows]
    return hidden, weight, drawn.to(DEVICE)


def run(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dlosses: Tensor) -> list[Tensor]:
    """Return the losses and both gradients."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    losses = function(*leaves, targets, **OPTIONS)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, dlosses.to(losses.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "vocab", "options"), [(7, 24, 2501, OPTIONS), (6, 16, 1000, {}), (1, 3, 1, OPTIONS)]
)
def test_losses_and_gradients(
    dtype: torch.dtype, rows: int, features: int, vocab: int, options: dict[str, float]
) -> None:
    """2501 columns are blocks of 1024, 1024 and 453: an odd last one."""
    with poisoned():
        assert_as_good_as_plain(
            lambda *given: linear_cross_entropy(*given, **options),
            lambda *given: reference.linear_cross_entropy(*given, **options),
            inputs(rows, features, vocab, dtype),
            names=["hidden", "weight"],
            floor=ROUNDINGS,
        )


def test_strided_inputs_and_gradients_of_one_input_alone() -> None:
    hidden, weight, targets = inputs(5, 12, 1500)
    expected = run(linear_cross_entropy, hidden, weight, targets, torch.ones(5, device=DEVICE))
    strided = hidden.t().contiguous().t(), torch.cat((weight, weight), dim=1)[:, :12]
    leaves = [x.detach().requires_grad_() for x in strided]
    linear_cross_entropy(*leaves, targets, **OPTIONS).sum().backward()  # the gradient of a sum is expanded
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected[1:])
    for needed in (0, 1):
        leaves = [x.detach().requires_grad_(i == needed) for i, x in enumerate((hidden, weight))]
        linear_cross_entropy(*leaves, targets, **OPTIONS).sum().backward()
        torch.testing.assert_close(leaves[needed].grad, expected[1 + needed])
        assert leaves[1 - needed].grad is None


def test_ignored_rows_and_no_rows() -> None:
    hidden, weight, _ = inputs(3, 8, 1100)
    for rows in (3, 0):
        losses, *gradients = run(
            linear_cross_entropy, hidden[:rows], weight, torch.full((rows,), -100, device=DEVICE), normal(rows)
        )
        assert losses.shape == (rows,) and not losses.any()
        assert all(
            torch.equal(dx, torch.zeros_like(x)) for dx, x in zip(gradients, (hidden[:rows], weight), strict=True)
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_or_target_gives_nan_in_its_row_alone(bad: float) -> None:
    hidden, weight, targets = inputs(3, 8, 1100)
    hidden[0, 3], targets[2], targets[1] = bad, 1100, 7
    losses, d_hidden, _ = run(linear_cross_entropy, hidden, weight, targets, torch.ones(3, device=DEVICE))
    assert losses.isnan().tolist() == d_hidden.isnan().any(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_shards_give_what_the_whole_gives(dtype: torch.dtype) -> None:
    """The second shard has 20 rows of padding, the third nothing else; fp64 has no kernel."""
    (hidden, weight, targets), vocab = inputs(6, 16, 2500, dtype), 2500
    targets[1] = 1299
    dlosses = normal(6).to(torch.promote_types(dtype, torch.float32))
    parts = []
    for first, columns in ((0, 1300), (1300, 1200), (2500, 0)):
        part = torch.full_like(weight[: columns + 20], math.nan)
        part[:columns] = weight[first : first + columns]
        parts.append((part, targets - first, columns))
    with poisoned():
        statistics = [linear_cross_entropy_statistics(hidden, *part) for part in parts]
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
        d_hidden, d_weight = torch.zeros_like(hidden, dtype=losses.dtype), []
        for part, local, columns in parts:
            sizes = {"columns": columns, "vocab": vocab, "lse_rest_N": rest, **OPTIONS}
            share, dw = linear_cross_entropy_gradients(hidden, part, local, lse, dlosses, **sizes)
            assert not dw[columns:].any() and share.dtype == dw.dtype == dtype
            d_hidden += share
            d_weight.append(dw[:columns])
            alone, none = linear_cross_entropy_gradients(hidden, part, local, lse, dlosses, need_weight=False, **sizes)
            assert torch.equal(alone, share) and none.shape == (0,)
    exact = [x.double() for x in (hidden, weight)]
    right = run(reference.linear_cross_entropy, *exact, targets, dlosses)
    usual = run(reference.linear_cross_entropy, hidden, weight, targets, dlosses)
    # Two parts of d_hidden are rounded to the dtype where plain torch rounds one sum.
    floor = {torch.float64: 1e-14, torch.float32: ROUNDINGS}.get(dtype, torch.finfo(dtype).eps)
    assert_error_at_most_twice("losses", losses, usual[0], right[0], floor)
    assert_error_at_most_twice("gradient of hidden", d_hidden.to(dtype), usual[1], right[1], floor)
    assert_error_at_most_twice("gradient of weight", torch.cat(d_weight), usual[2], right[2], floor)


def test_the_hidden_gradient_is_summed_over_blocks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the exact product of the same bf16 gradient: a rounding or two (0.0017 each); 40 in a sum in bf16."""
    hidden, weight, targets = inputs(16, 32, 2560, torch.bfloat16)
    logits = hidden @ weight.t()
    lse, dlosses = logits.float().logsumexp(dim=1), torch.ones(16, device=DEVICE)
    sizes = {"columns": 2560, "vocab": 2560, **OPTIONS}
    cross_entropy_gradient_(logits, targets, lse, dlosses, **sizes)
    exact = logits.double() @ weight.double()
    monkeypatch.setattr(file, "block_columns", lambda columns: 64)
    d_hidden, _ = linear_cross_entropy_gradients(hidden, weight, targets, lse, dlosses, **sizes)
    error = float((d_hidden.double() - exact).norm() / exact.norm())
    assert error < 0.004, f"{error:.2e}; MEGALM_TEST_SEED={RUN_SEED}"


@pytest.mark.parametrize("columns", [0, 1, 1000, 1024, 5000, 16384 + 2048 + 5, 50257, 128256])
def test_a_block_is_a_sixteenth_or_1024_columns(columns: int) -> None:
    block = block_columns(columns)
    assert block == columns if columns <= 1024 else block % 128 == 0
    assert block <= max(1024, columns / 16) and (columns <= 1024 or block >= 1024)


def test_one_buffer_of_a_block_is_all_and_only_inputs_and_numbers_of_rows_are_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, targets = inputs(4, 8, 17_000)
    weight = torch.nn.Parameter(weight)
    buffers: list[tuple[int, int]] = []
    saved: list[Tensor] = []

    def spy(original: Any, logits: Tensor, *rest: Any, **options: Any) -> None:
        buffers.append((logits.untyped_storage().data_ptr(), logits.untyped_storage().nbytes()))
        original(logits, *rest, **options)

    for name in ("launch_statistics", "launch_gradient"):
        monkeypatch.setattr(file, name, functools.partial(spy, getattr(file, name)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        losses = linear_cross_entropy(hidden, weight, targets)
    assert len(set(buffers)) == 1
    buffers.clear()
    losses.sum().backward()
    assert len(set(buffers)) == 1 and len(buffers) == 17
    assert all(size <= 4 * 4 * 17_000 / 16 for _, size in buffers)
    assert sum(x.numel() for x in saved) == hidden.numel() + weight.numel() + 3 * 4
    assert any(x is weight for x in saved), "a view of a parameter would keep the storage that ZeRO 3 gathers"


def test_wrong_arguments_are_named() -> None:
    hidden, weight, targets = inputs(3, 8, 10)
    with pytest.raises(ValueError, match=r"weight torch\.float32 of shape \(10, 7\) for hidden .*\(3, 8\); give"):
        linear_cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ValueError, match=r"weight torch\.bfloat16 .* both of one dtype"):
        linear_cross_entropy(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"hidden .* targets of shape \(2,\)"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match=r"columns=11 of 10"):
        linear_cross_entropy_statistics(hidden, weight, targets, 11)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(4, 8, 1300)
    lse, dlosses = normal(4), normal(4)

    def everything() -> Any:
        return (
            run(linear_cross_entropy, hidden, weight, targets, dlosses),
            linear_cross_entropy_statistics(hidden, weight, targets, 1200),
            linear_cross_entropy_gradients(hidden, weight, targets, lse, dlosses, columns=1200, vocab=1200, **OPTIONS),
        )

    expected = everything()
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(everything(), expected, rtol=1e-4, atol=1e-5)


def test_the_ops_are_good_citizens_of_torch() -> None:
    hidden, weight, targets = inputs(3, 8, 40)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    row, tail = normal(3), (39, 39, 0.1, 0.01, True, False)
    torch.library.opcheck(file._linear_cross_entropy_op, (*leaves, targets, -100, 0.1, 0.01))
    plain = hidden.detach(), weight.detach()
    torch.library.opcheck(file._statistics_op, (*plain, targets, 39))
    torch.library.opcheck(file._gradients_op, (*plain, targets, row, row, row, *tail))


def test_compiled_and_checkpointed_gradients_are_those_of_eager() -> None:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(2.0 * hidden, weight, targets, **OPTIONS).square().sum()

    hidden, weight, targets = inputs(4, 8, 1100)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled, lambda *given: checkpoint(loss, *given, use_reentrant=False)):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="large shapes and the fp32 results of bf16 products need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [128256, 50257])
def test_large_vocabularies(dtype: torch.dtype, vocab: int) -> None:
    assert_as_good_as_plain(
        lambda *given: linear_cross_entropy(*given, **OPTIONS),
        lambda *given: reference.linear_cross_entropy(*given, **OPTIONS),
        inputs(512, 256, vocab, dtype),
        names=["hidden", "weight"],
    )
