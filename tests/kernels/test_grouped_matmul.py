"""The experts' matrix products: a row times its expert's matrix, wherever experts begin, without asking the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalm.kernels import grouped_matmul as file
from megalm.kernels import launch, reference
from megalm.kernels.grouped_matmul import grouped_matmul
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, fresh_seed, normal, poisoned

COUNTS = {
    "uneven": (5, 0, 17, 1),
    "empty first and last": (0, 32, 0),
    "one has all": (0, 23),
    "one expert": (19,),
    "rows of nobody": (3, 0, 20),
    "nobody's row begins a tile": (16,),
    "none has any": (0, 0),
}
NOBODYS = {"rows of nobody": 21, "nobody's row begins a tile": 1, "none has any": 6}
LIMIT = 3e-7
"""fp32: sums of up to 70 products in another order than torch's."""


def inputs(counts: tuple[int, ...], D: int, F: int, dtype: torch.dtype, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and counts; `more` rows belong to no expert."""
    x = normal(sum(counts) + more, D, dtype=dtype)
    weight = normal(len(counts), F, D, dtype=dtype, scale=D**-0.5)
    return x, weight, torch.tensor(counts, device=DEVICE)


def run(function: Any, x: Tensor, weight: Tensor, counts: Tensor, dy: Tensor) -> list[Tensor]:
    """Return y, dx and dweight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = function(*leaves, counts)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_products_and_gradients(dtype: torch.dtype, name: str) -> None:
    """Odd widths: 37 and 45 leave a rest in every block."""
    with poisoned():
        assert_as_good_as_plain(
            grouped_matmul,
            reference.grouped_matmul,
            inputs(COUNTS[name], 37, 45, dtype, NOBODYS.get(name, 0)),
            names=["x", "weight"],
            floor=LIMIT,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_that_blocks_divide(dtype: torch.dtype) -> None:
    with poisoned():
        assert_as_good_as_plain(
            grouped_matmul,
            reference.grouped_matmul,
            inputs((7, 40, 0, 18), 64, 96, dtype, 5),
            names=["x", "weight"],
            floor=LIMIT,
        )


def test_256_experts_of_which_most_are_idle() -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    chosen = torch.randint(256, (20,), generator=generator)
    counts = torch.bincount(chosen, minlength=256).to(DEVICE, torch.int32)
    x, weight = normal(22, 5), normal(256, 3, 5)
    expected = torch.zeros(22, 3, device=DEVICE)
    expected[:20] = torch.einsum("nd,nfd->nf", x[:20], weight[chosen.sort().values.to(DEVICE)])
    torch.testing.assert_close(grouped_matmul(x, weight, counts), expected)


@pytest.mark.parametrize("experts", [1, 3, 5])
def test_every_row_is_computed_however_the_borders_lie(experts: int) -> None:
    """Random counts, with tiles of 16 rows: borders at, before and behind those of tiles, several within one."""
    generator = torch.Generator().manual_seed(fresh_seed())
    for _ in range(3):
        counts = torch.randint(0, 40, (experts,), generator=generator)
        counts[torch.randint(experts, (1,), generator=generator)] = 16 * torch.randint(3, (1,), generator=generator)
        rows = int(counts.sum()) + int(torch.randint(3, (1,), generator=generator))
        numbers = torch.arange(experts).repeat_interleave(counts).to(DEVICE)
        weight = 1.0 + torch.arange(experts, device=DEVICE, dtype=torch.float32)[:, None, None]
        y = grouped_matmul(torch.ones(rows, 1, device=DEVICE), weight, counts.to(DEVICE))
        assert y[: len(numbers), 0].tolist() == (1.0 + numbers).tolist(), counts
        assert not y[len(numbers) :].any(), counts


def test_numbers_of_one_expert_do_not_reach_another() -> None:
    """A tile's last rows are the next expert's, and blocks go beyond the widths: NaN there would spread as 0 * NaN."""
    x, weight, counts = inputs((5, 6, 7), 24, 40, torch.float32, 3)
    x[5:11], weight[1] = torch.nan, torch.nan
    x[18:] = torch.nan
    y, dx, dweight = run(grouped_matmul, x, weight, counts, normal(21, 40))
    mine = torch.tensor([True] * 5 + [False] * 6 + [True] * 10, device=DEVICE)
    for result in (y, dx):
        assert torch.equal(result.isfinite().all(dim=1), mine) and not result[18:].any()
    assert dweight.isfinite().all(dim=2).all(dim=1).tolist() == [True, False, True]


def test_strided_inputs_and_gradients() -> None:
    x, weight, counts = inputs((5, 9), 24, 40, torch.float32, 2)
    dy = normal(16, 40)
    expected = run(grouped_matmul, x, weight, counts, dy)
    wide_x, both = torch.cat((x, x), dim=1), torch.stack((weight, weight), dim=1)
    strided = [
        (wide_x[:, 24:], both[:, 1]),  # a part of the features; one of two matrices that stand side by side
        (x.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2)),
        (x, torch.stack((weight, weight), dim=-1)[..., 0]),
    ]
    for given in strided:
        torch.testing.assert_close(run(grouped_matmul, *given, counts, dy), expected)
    torch.testing.assert_close(run(grouped_matmul, x, weight, counts, dy.t().contiguous().t()), expected)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    grouped_matmul(*leaves, counts).sum().backward()  # the gradient of a sum is expanded
    ones = run(grouped_matmul, x, weight, counts, torch.ones_like(dy))
    torch.testing.assert_close([leaf.grad for leaf in leaves], ones[1:])


@pytest.mark.parametrize("needed", [0, 1])
def test_gradients_of_one_input_alone(needed: int) -> None:
    x, weight, counts = inputs((5, 0, 20), 24, 40, torch.float32)
    dy = normal(25, 40)
    leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate((x, weight))]
    grouped_matmul(*leaves, counts).backward(dy)
    torch.testing.assert_close(leaves[needed].grad, run(grouped_matmul, x, weight, counts, dy)[1 + needed])
    assert leaves[1 - needed].grad is None


@pytest.mark.parametrize(("rows", "D", "F"), [(0, 8, 8), (4, 0, 8), (4, 8, 0), (1, 1, 1)])
def test_nothing_to_multiply(rows: int, D: int, F: int) -> None:
    counts = torch.tensor([0, rows, 0], device=DEVICE)
    with poisoned():
        given = normal(rows, D), normal(3, F, D), counts, normal(rows, F)
        torch.testing.assert_close(run(grouped_matmul, *given), run(reference.grouped_matmul, *given))


def test_a_weight_gradient_is_summed_in_fp32() -> None:
    """256 + 256/16 is a bf16; 256 + 1, or any sum of 16 rows more, is none."""
    x = torch.full((257, 4), 0.0625, dtype=torch.bfloat16, device=DEVICE)
    x[0] = 256.0
    weight = torch.ones(2, 4, 4, dtype=torch.bfloat16, device=DEVICE)
    _, _, dweight = run(grouped_matmul, x, weight, torch.tensor([257, 0], device=DEVICE), torch.ones_like(x))
    assert torch.equal(dweight[0], torch.full_like(dweight[0], 272.0)) and not dweight[1].any()


def test_what_is_saved_are_the_inputs_as_they_were_given() -> None:
    x, weight, counts = inputs((5, 6), 8, 8, torch.float32)
    weight = torch.nn.Parameter(weight)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_matmul(x, weight, counts)
    assert len(saved) == 3
    assert any(t is weight for t in saved), "a view of a parameter would keep the storage that ZeRO 3 gathers"


def test_wrong_arguments_are_named() -> None:
    x, weight, counts = inputs((2, 1), 8, 10, torch.float32)
    with pytest.raises(ValueError, match=r"x torch\.float32 \(3, 7\) and weight torch\.float32 \(2, 10, 8\); give"):
        grouped_matmul(x[:, :7], weight, counts)
    with pytest.raises(ValueError, match=r"weight torch\.bfloat16 .* both of one dtype"):
        grouped_matmul(x, weight.bfloat16(), counts)
    with pytest.raises(ValueError, match=r"counts torch\.int64 \(1,\); give int32 or int64 \[2\]"):
        grouped_matmul(x, weight, counts[:1])
    with pytest.raises(ValueError, match=r"counts torch\.float32 \(2,\)"):
        grouped_matmul(x, weight, counts.float())
    with pytest.raises(ValueError, match=r"5000 experts; at most 4096"):
        grouped_matmul(x, weight[:1].expand(5000, 10, 8), torch.zeros(5000, dtype=torch.int64, device=DEVICE))


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, counts = inputs((5, 0, 20), 24, 40, torch.float32, 2)
    dy = normal(27, 40)
    expected = run(grouped_matmul, x, weight, counts, dy)
    exact = run(grouped_matmul, x.double(), weight.double(), counts, dy.double())
    assert {t.dtype for t in exact} == {torch.float64}
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(run(grouped_matmul, x, weight, counts, dy), expected)


@pytest.mark.parametrize("function", [grouped_matmul, reference.grouped_matmul], ids=["kernel", "reference"])
def test_tensors_without_memory_have_results_of_the_right_shape(function: Any) -> None:
    x, weight = torch.empty(7, 4, device="meta"), torch.empty(3, 5, 4, device="meta")
    counts = torch.empty(3, dtype=torch.int64, device="meta")
    results = run(function, x, weight, counts, torch.empty(7, 5, device="meta"))
    assert [tuple(t.shape) for t in results] == [(7, 5), (7, 4), (3, 5, 4)]


def test_the_ops_are_good_citizens_of_torch() -> None:
    x, weight, counts = inputs((2, 3), 8, 12, torch.float32, 1)
    leaves = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(file._grouped_matmul_op, (*leaves, counts))
    torch.library.opcheck(reference._grouped_products, (*leaves, counts))
    plain = x.detach(), weight.detach()
    torch.library.opcheck(file._backward_op, (normal(6, 12), *plain, counts, True, False))
    torch.library.opcheck(reference._grouped_weight_gradients, (normal(6, 12), x.detach(), counts))


@pytest.mark.parametrize("function", [grouped_matmul, reference.grouped_matmul], ids=["kernel", "reference"])
def test_compiled_and_checkpointed_gradients_are_those_of_eager(function: Any) -> None:
    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return function(2.0 * x, weight, counts).square().sum()

    x, weight, counts = inputs((5, 0, 20), 8, 12, torch.float32, 2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loss, compiled, lambda *given: checkpoint(loss, *given, use_reentrant=False)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
        call(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="large shapes, and a host that may not wait, need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("experts", "D", "F"), [(8, 1024, 2816), (256, 512, 384), (64, 528, 1000)])
def test_large_products_that_the_host_does_not_wait_for(dtype: torch.dtype, experts: int, D: int, F: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    shares = torch.rand(experts, generator=generator) ** 4  # few experts have most rows, some none
    counts = tuple((8192 * shares / shares.sum()).int().tolist())
    x, weight, counts_E = inputs(counts, D, F, dtype, 100)
    assert_as_good_as_plain(grouped_matmul, reference.grouped_matmul, (x, weight, counts_E), names=["x", "weight"])
    dy = normal(x.shape[0], F, dtype=dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(grouped_matmul, x, weight, counts_E, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_places_beyond_32_bits() -> None:
    """Strides fit into 32 bits, as in practice: only their multiples do not. Few pages of the memory are touched."""
    memory = torch.empty(2**31 + 2**27, dtype=torch.float16, device=DEVICE)
    x, weight, counts = inputs((260, 0, 8), 8, 8, torch.float16)
    dy = normal(268, 8, dtype=torch.float16)
    stride = 2**23 - 16  # beyond that rows are copied
    far_x = memory.as_strided(x.shape, (stride, 1)).copy_(x)
    far_dy = memory[64:].as_strided(dy.shape, (stride, 1)).copy_(dy)
    far_weight = memory[2**12 :].as_strided(weight.shape, (2**30 + 32, 8, 1)).copy_(weight)
    expected = run(grouped_matmul, x, weight, counts, dy)
    torch.testing.assert_close(run(grouped_matmul, far_x, far_weight, counts, far_dy), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="results of more than 2^31 elements need a GPU")
@pytest.mark.parametrize(("counts", "D", "F"), [((2**20, 16), 16, 2**11), ((60, *[0] * 511, 4), 2**11, 2**11)])
def test_results_beyond_32_bits(counts: tuple[int, ...], D: int, F: int) -> None:
    """y is, or the weight's gradient; of each the last expert's part stands for all."""
    x, weight, counts_E = inputs(counts, D, F, torch.bfloat16)
    last, dy = counts[-1], normal(x.shape[0], F, dtype=torch.bfloat16)
    y, _, dweight = run(grouped_matmul, x, weight, counts_E, dy)
    torch.testing.assert_close(y[-last:], x[-last:] @ weight[-1].t(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dweight[-1], dy[-last:].t() @ x[-last:], rtol=1e-2, atol=1e-2)
