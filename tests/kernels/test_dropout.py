"""Dropout and residual addition in one kernel: the CPU path's masks, whatever part of the tensor is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.distributed.random import keep_slice
from megalm.kernels import dropout as file
from megalm.kernels import launch, reference
from megalm.kernels.dropout import dropout
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, fresh_seed, poisoned

SEED = 2**63 + 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(fresh_seed())).to(DEVICE)


def part_of(whole: Tensor, samples: slice, tokens: slice) -> Tensor:
    return whole[samples, tokens]


@pytest.mark.parametrize("features", [36, 37])
@pytest.mark.parametrize(("samples", "tokens"), [(slice(0, 4), slice(0, 7)), (slice(1, 3), slice(2, 6))])
def test_the_mask_is_the_part_of_the_whole_tensors_mask(features: int, samples: slice, tokens: slice) -> None:
    whole_keep = keep_slice(SEED, 0.3, (4, 7, features), (0, 0, 0), (4, 7, features), torch.device("cpu"))
    x = random(4, 7, features)[samples, tokens]
    origin = (samples.start, tokens.start, 7)
    for function in (dropout, reference.dropout):
        y = function(x, dropout=0.3, seed=SEED, dropout_origin=origin)
        assert torch.equal(y.cpu() != 0, whole_keep[samples, tokens])


def test_indices_beyond_32_bits_are_not_cut_off() -> None:
    x = random(2, 3, 8)
    origin = (2**20 + 3, 5, 2**11)
    first = [(origin[0] * origin[2] + origin[1]) * 8, ((origin[0] + 1) * origin[2] + origin[1]) * 8]
    y = dropout(x, dropout=0.5, seed=SEED, dropout_origin=origin)
    for row, at in zip(y, first, strict=True):
        kept = keep_slice(SEED, 0.5, (at + 24,), (at,), (24,), torch.device("cpu"))
        assert torch.equal((row != 0).flatten().cpu(), kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 3, 37), (1, 1, 1)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], with_residual: bool) -> None:
    def run(function, x, *rest):  # type: ignore[no-untyped-def]
        residual = rest[0] if rest else None
        return function(x, dropout=0.2, seed=SEED, dropout_origin=(3, 1, 9), residual=residual)

    inputs = [random(*shape).to(dtype) for _ in range(1 + with_residual)]
    with poisoned():
        assert_as_good_as_plain(lambda *a: run(dropout, *a), lambda *a: run(reference.dropout, *a), inputs)


def test_strided_and_empty_inputs_and_expanded_gradients() -> None:
    x = random(4, 6, 8).transpose(0, 1).requires_grad_()
    y = dropout(x, dropout=0.2, seed=1)
    assert torch.equal(y, dropout(x.contiguous(), dropout=0.2, seed=1))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (y != 0) * 1.25)
    assert dropout(random(0, 3, 4), dropout=0.2, seed=1).shape == (0, 3, 4)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"dropout=1\.5 is no rate"):
        dropout(random(1, 2, 3), dropout=1.5, seed=1)
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*give \[B, T, D\]"):
        dropout(random(2, 3), dropout=0.5, seed=1)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = random(2, 3, 8), random(2, 3, 8)
    expected = dropout(x, dropout=0.2, seed=1, residual=residual)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(dropout(x, dropout=0.2, seed=1, residual=residual), expected)


def test_the_op_is_a_good_citizen_of_torch() -> None:
    x = random(2, 3, 8).requires_grad_()
    arguments = (x, random(2, 3, 8).requires_grad_(), 0.2, 17, [0, 0, 3])
    torch.library.opcheck(file._dropout_op, arguments)
    compiled = torch.compile(
        lambda x: dropout(x, dropout=0.2, seed=3).square().sum(), fullgraph=True, backend="aot_eager"
    )
    compiled(x).backward()
    gradient, x.grad = x.grad, None
    dropout(x, dropout=0.2, seed=3).square().sum().backward()
    assert torch.equal(gradient, x.grad)
