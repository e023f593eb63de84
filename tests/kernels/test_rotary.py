"""Rotary positions in one kernel: any tables, any strides, every part of a head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels import launch, reference
from megalm.kernels.rotary import apply_rotary
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, normal, poisoned


def assert_agrees(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Fail unless kernel and reference agree on x. The tables are no inputs of the rule: they get no gradient."""
    with poisoned():
        assert_as_good_as_plain(
            lambda x: apply_rotary(x, cos, sin), lambda x: reference.apply_rotary(x, cos, sin), [x], names=["x"]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "turned", "table_rows"),
    [
        ((2, 37, 5, 64), 64, ()),  # blocks of tokens and of heads, the last of each not full
        ((3, 19, 2, 40), 40, (3,)),  # 20 pairs are no power of two
        ((2, 21, 6, 48), 20, ()),
        ((2, 5, 3, 37), 10, (2,)),
        ((1, 1, 1, 2), 2, ()),
    ],
)
def test_values_and_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], turned: int, table_rows: tuple[int, ...]
) -> None:
    """The tables are cosines and sines of nothing: a backward pass that takes one half for the other shows."""
    tables = [normal(*table_rows, shape[1], turned) for _ in range(2)]
    assert_agrees(normal(*shape, dtype=dtype), *tables)


def test_the_angles_of_a_model_keep_every_pairs_length() -> None:
    x_BTHE = normal(2, 9, 3, 16)
    angles_TE = (torch.arange(9)[:, None] * 100.0 ** (-torch.arange(8) / 8)).repeat(1, 2).to(DEVICE)
    y_BTHE = apply_rotary(x_BTHE, angles_TE.cos(), angles_TE.sin())
    numbers = torch.complex(*x_BTHE.chunk(2, -1)) * torch.exp(1j * angles_TE[:, None, :8])
    torch.testing.assert_close(y_BTHE, torch.cat((numbers.real, numbers.imag), dim=-1))


@pytest.mark.parametrize("turned", [32, 12])
def test_strided_inputs_gradients_and_tables_are_read_where_they_lie(
    turned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = normal(4, 18, 7, 32, dtype=torch.bfloat16)
    tables = normal(2, 4, 18, turned)
    views = (
        (slice(None), slice(None), slice(0, 4)),
        (slice(None), slice(None), slice(4, 6)),
        (slice(None, None, 2), slice(3, 12), slice(1, None, 3)),
    )
    for view in views:
        x, (cos, sin) = qkv[view], tables[(slice(None), *view[:2])]
        assert_agrees(x, cos, sin)
        expected = apply_rotary(x.contiguous(), cos.contiguous(), sin.contiguous())
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "contiguous", None)
            y = apply_rotary(x, cos, sin)
        assert y.is_contiguous() and torch.equal(y, expected)


def test_expanded_and_transposed_inputs_and_gradients() -> None:
    cos, sin = normal(5, 8), normal(8, 5).T
    assert_agrees(normal(1, 1, 3, 8).expand(2, 5, 3, 8), cos, sin)
    assert_agrees(normal(2, 8, 3, 5).transpose(1, 3), cos.expand(2, 5, 8), sin.expand(2, 5, 8))
    x = normal(2, 5, 3, 8).requires_grad_()
    apply_rotary(x, cos, sin).sum().backward()
    (expected,) = torch.autograd.grad(reference.apply_rotary(x, cos, sin).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_empty_inputs_give_empty_outputs(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = apply_rotary(x, normal(shape[1], 4), normal(shape[1], 4))
    y.sum().backward()
    assert y.shape == shape and x.grad is not None and x.grad.shape == shape


def test_offsets_beyond_32_bits_are_not_cut_off() -> None:
    """Strides fit into 32 bits here, as they do in practice: only their multiples do not."""
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # of which few pages are ever touched
    for shape, strides in (((1, 3, 1, 8), (8, 2**30, 8, 1)), ((3, 1, 1, 8), (2**30, 8, 8, 1))):
        view = x.as_strided(shape, strides).copy_(normal(*shape))
        tables = normal(2, shape[1], 8)
        torch.testing.assert_close(apply_rotary(view, *tables), reference.apply_rotary(view, *tables))


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((2, 3, 4), (3, 4), (3, 4), r"\(2, 3, 4\); give \[B, T, H, E\]"),
        ((2, 3, 1, 4), (4, 4), (4, 4), r"cosines \(4, 4\).*give both as \[3, R\] or \[2, 3, R\]"),
        ((2, 3, 1, 4), (1, 3, 4), (1, 3, 4), r"give both as \[3, R\] or \[2, 3, R\]"),
        ((2, 3, 1, 4), (3, 4), (3, 2), r"cosines \(3, 4\) and sines \(3, 2\)"),
        ((2, 3, 1, 4), (), (), r"cosines \(\)"),
        ((2, 3, 1, 4), (3, 3), (3, 3), "turns R=3 of 4 features; R is even, 2 or more and at most E"),
        ((2, 3, 1, 4), (3, 6), (3, 6), "turns R=6 of 4"),
        ((2, 3, 1, 4), (3, 0), (3, 0), "turns R=0 of 4"),
    ],
)
def test_wrong_shapes_are_named(x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cos, sin = normal(2, 3, 2, 8), normal(3, 4), normal(3, 4)
    expected = apply_rotary(x, cos, sin)
    double = apply_rotary(x.double(), cos, sin)
    assert double.dtype is torch.float64
    torch.testing.assert_close(double.float(), expected)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected)


def test_the_operations_are_registered_as_torch_wants_them() -> None:
    x, cos, sin = normal(2, 3, 2, 8), normal(3, 4), normal(3, 4)
    torch.library.opcheck(torch.ops.megalm.rotary_forward.default, (x.requires_grad_(), cos, sin))
    torch.library.opcheck(torch.ops.megalm.rotary_backward.default, (x.detach(), cos, sin))


def test_compiled_code_holds_the_operation() -> None:
    cos, sin = normal(3, 4), normal(3, 4)
    compiled = torch.compile(lambda x: 2.0 * apply_rotary(x, cos, sin), fullgraph=True, backend="aot_eager")
    x = normal(2, 3, 2, 8).requires_grad_()
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad((2.0 * apply_rotary(x, cos, sin)).square().sum(), x)
    torch.testing.assert_close(actual, expected)
