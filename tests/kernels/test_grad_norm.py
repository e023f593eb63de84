"""The norm over many tensors: right for any shapes, strides and dtypes, the same bit for bit in every run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalm.kernels import grad_norm as file
from megalm.kernels import launch, reference
from megalm.kernels.grad_norm import grad_norm
from tests.kernels.checks import DEVICE, DTYPES, RUN_SEED, normal, poisoned


def mixed() -> list[Tensor]:
    """Return tensors of all dtypes: longer than a chunk, misaligned between NaN, permuted, strided, expanded, empty."""
    surrounded = torch.full((9005,), math.nan, device=DEVICE)
    surrounded[3:9001] = normal(8998)
    halves = torch.full((50,), math.nan, dtype=torch.float16, device=DEVICE)
    halves[7:8] = 3.0
    return [
        normal(3, 5000),
        normal(),
        normal(77, 130, dtype=torch.bfloat16).t(),
        surrounded[3:9001],
        normal(8, 6, 4).permute(1, 2, 0)[:, ::2],
        normal(3, 1, dtype=torch.float16).expand(3, 70),
        normal(0, 4),
        halves[7:8],
        normal(4099, dtype=torch.float16, scale=100.0),
    ]


def exact(tensors: list[Tensor]) -> float:
    return float(torch.cat([x.double().flatten() for x in tensors]).norm())


@pytest.mark.parametrize("most", [1024, 3])
def test_norm_over_tensors_of_all_kinds(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of positive numbers by lanes in fp32: some roundings. With `most` 3, a dtype takes several launches."""
    monkeypatch.setattr(file, "_MOST_TENSORS", most)
    tensors = mixed()
    with poisoned():
        norm, square = grad_norm(tensors), grad_norm(tensors, squared=True)
    assert norm.dtype == square.dtype == torch.float32 and norm.shape == square.shape == ()
    assert math.isclose(norm, exact(tensors), rel_tol=3e-7), f"MEGALM_TEST_SEED={RUN_SEED}"
    assert math.isclose(square, exact(tensors) ** 2, rel_tol=6e-7), f"MEGALM_TEST_SEED={RUN_SEED}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_counts_once(dtype: torch.dtype) -> None:
    """Each of these squares is exact, and so is the sum: around the borders of vectors, blocks and chunks."""
    block, chunk = (launch.settings("grad_norm", "sum_chunks")[key] for key in ("BLOCK", "CHUNK"))
    sizes = [size + more for size in (8, block, chunk, 2 * chunk) for more in (-1, 0, 1)]
    memory = torch.full((sum(sizes) + 4 * len(sizes),), math.nan, dtype=dtype, device=DEVICE)
    tensors, at = [], 0
    for size in sizes:
        tensors.append(memory[at : at + size].fill_(1.0))
        at += size + 3
    assert float(grad_norm(tensors, squared=True)) == sum(sizes)


@pytest.mark.parametrize("count", [1000, 2**24 + 5])
def test_the_reference_loses_no_digits_over_long_tensors(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(1))
    exact = x.double().norm().item()
    assert reference.grad_norm([x, x[:0]]).item() == pytest.approx(exact, rel=1e-6)
    assert reference.grad_norm([x, -x], squared=True).item() == pytest.approx(2 * exact**2, rel=1e-6)
    assert reference.grad_norm([x.double()]).item() == pytest.approx(exact, rel=1e-12)


def test_equal_tensors_have_equal_norms_wherever_they_lie() -> None:
    tensors = [normal(3, 5000), normal(9001, dtype=torch.bfloat16), normal(70, 3, dtype=torch.float16)]
    norm = grad_norm(tensors)
    assert torch.equal(grad_norm(tensors), norm)
    moved = [torch.cat((x.new_zeros(offset), x.flatten()))[offset:] for offset, x in enumerate(tensors, start=1)]
    assert moved[0].data_ptr() % 16 != 0 and torch.equal(grad_norm(moved), norm)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 8, -1])
def test_inf_and_nan_come_through(bad: float, place: int) -> None:
    tensors = mixed()
    tensors[place].view(-1)[-1] = bad
    norm = float(grad_norm(tensors))
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


def test_no_elements_give_zero() -> None:
    for tensors in ([], [normal(0)], [normal(0, 3), normal(2, 0)]):
        assert float(grad_norm(tensors)) == float(grad_norm(tensors, squared=True)) == 0.0


def test_parameters_and_their_gradients_are_taken_without_recording() -> None:
    assert not grad_norm([normal(4).requires_grad_()]).requires_grad


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"grad_norm of torch\.int64 tensors; give floating-point"):
        grad_norm([normal(3), torch.zeros(3, dtype=torch.int64, device=DEVICE)])
    with pytest.raises(ValueError, match=r"on .*meta.*; give all on one device"):
        grad_norm([normal(3), torch.zeros(3, device="meta")])


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = mixed()
    expected = grad_norm(tensors), grad_norm(tensors, squared=True)
    wide = grad_norm([x.double() for x in tensors])
    assert wide.dtype is torch.float64 and math.isclose(wide, exact(tensors), rel_tol=1e-13)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close((grad_norm(tensors), grad_norm(tensors, squared=True)), expected)
    assert reference.grad_norm([]).shape == ()


def test_the_op_is_a_good_citizen_of_torch() -> None:
    tensors = [normal(5), normal(3, 4, dtype=torch.bfloat16)]
    torch.library.opcheck(file._grad_norm_op, (tensors, False))
    compiled = torch.compile(lambda *xs: grad_norm([2.0 * x for x in xs]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), grad_norm([2.0 * x for x in tensors]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="tensors of more than 2^31 elements need a GPU")
def test_a_tensor_of_more_than_32_bits() -> None:
    many = torch.ones(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    assert math.isclose(grad_norm([many, many[:7]], squared=True), 2**31 + 2**20 + 7, rel_tol=1e-6)
