"""Embedding lookup: a gradient that is summed in fp32 and is the same bit for bit whatever runs first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels import embedding as file
from megalm.kernels import launch, reference
from megalm.kernels.embedding import embedding
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, fresh_seed, normal, poisoned


def random_tokens(count: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(fresh_seed())).to(DEVICE)


def gradient(tokens: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(embedding(tokens, weight), weight, dy)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [256, 301, 1])
def test_rows_and_gradients(dtype: torch.dtype, features: int) -> None:
    """Tokens once and often, one of them much more often than a piece is long."""
    tokens = torch.cat(
        (random_tokens(40, 60), torch.full((70,), 7, device=DEVICE), torch.tensor([0, 59], device=DEVICE))
    )
    tokens = tokens[torch.randperm(len(tokens))].view(4, -1)
    with poisoned():
        assert_as_good_as_plain(
            lambda weight: embedding(tokens, weight),
            lambda weight: reference.embedding(tokens, weight),
            [normal(60, features, dtype=dtype)],
            names=["weight"],
        )


@pytest.mark.parametrize("runs", [[8, 8, 8], [5, 11, 8, 1], [17], [7, 1, 1, 7], [1, 30], [3, 13, 24, 9], [40, 1], [1]])
def test_runs_of_equal_tokens_wherever_the_pieces_end(runs: list[int]) -> None:
    """Sums of small integers are exact: a row added twice or left out shows. Pieces are of 8 in the interpreter."""
    piece = launch.settings("embedding", "sum_pieces", 3)["PIECE"]
    runs = [max(1, run * piece // 8) for run in runs]
    tokens = torch.repeat_interleave(2 * torch.arange(len(runs)), torch.tensor(runs)).to(DEVICE)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(fresh_seed()))]
    dy = torch.arange(3.0 * len(tokens), device=DEVICE).view(-1, 3) % 101
    with poisoned():
        dweight = gradient(tokens, torch.zeros(2 * len(runs) + 1, 3, device=DEVICE), dy)
    assert torch.equal(dweight, torch.zeros_like(dweight).index_add_(0, tokens, dy))


@pytest.mark.parametrize(("dtype", "large"), [(torch.bfloat16, 256.0), (torch.float16, 2048.0)], ids=str)
def test_sums_of_16_bit_rows_are_taken_in_fp32(dtype: torch.dtype, large: float) -> None:
    """The large number plus 1 is no number of the dtype: each 1 would be lost in it before it is taken away again."""
    rows = torch.tensor([large, 1.0, -large, 1.0]).repeat_interleave(4).repeat(10)
    dy = rows[:, None].expand(160, 24).to(DEVICE, dtype)
    dweight = gradient(torch.ones(160, dtype=torch.int64, device=DEVICE), dy.new_zeros(3, 24), dy)
    assert dweight[1].eq(80.0).all() and not dweight[0].any() and not dweight[2].any()


def test_gradients_are_the_same_in_every_run() -> None:
    tokens, weight = random_tokens(200, 9), normal(9, 40)
    dy = normal(200, 40)
    first = gradient(tokens, weight, dy)
    assert torch.equal(gradient(tokens, weight, dy), first)


def test_strided_weights_expanded_gradients_and_no_tokens() -> None:
    weight, tokens = normal(6, 8).t(), torch.tensor([[1, 7, 1]], device=DEVICE)
    assert torch.equal(embedding(tokens, weight), weight[tokens])
    leaf = weight.detach().requires_grad_()
    embedding(tokens.t(), leaf).sum().backward()  # the gradient of a sum is expanded
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.tensor([0, 2, 0, 0, 0, 0, 0, 1.0], device=DEVICE)[:, None].expand(8, 6))
    for shape in ((0, 6), (8, 0)):
        leaf = torch.zeros(shape, device=DEVICE, requires_grad=True)
        y = embedding(tokens[:, : 3 * (shape[0] > 0)], leaf)
        y.sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == shape and y.shape[-1] == shape[1]
    assert not gradient(tokens[:0], weight, normal(0, 3, 6)).any()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"torch\.int32 tokens in a torch\.float32 weight of shape \(4, 2\); give int64"
    ):
        embedding(torch.zeros(3, dtype=torch.int32, device=DEVICE), normal(4, 2))
    with pytest.raises(ValueError, match=r"weight of shape \(4,\); give"):
        embedding(torch.zeros(3, dtype=torch.int64, device=DEVICE), normal(4))


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, weight, dy = random_tokens(30, 5), normal(5, 4), normal(30, 4)
    expected = embedding(tokens, weight), gradient(tokens, weight, dy)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close((embedding(tokens, weight), gradient(tokens, weight, dy)), expected)


def test_the_ops_are_good_citizens_of_torch() -> None:
    tokens, weight = random_tokens(12, 5).view(3, 4), normal(5, 4)
    torch.library.opcheck(file._embedding_op, (tokens, weight.clone().requires_grad_()))
    torch.library.opcheck(file._backward_op, (normal(3, 4, 4), tokens, 5))
    compiled = torch.compile(
        lambda weight: embedding(tokens, weight).square().sum(), fullgraph=True, backend="aot_eager"
    )
    leaf = weight.clone().requires_grad_()
    compiled(leaf).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, gradient(tokens, weight, 2.0 * weight[tokens]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="tables of more than 2^31 elements need a GPU")
def test_a_table_of_more_than_32_bits() -> None:
    features = 16384
    tokens = torch.tensor([2**17 + 5, 3, 2**17 + 5], device=DEVICE)
    weight = torch.zeros(2**17 + 8, features, dtype=torch.bfloat16, device=DEVICE)
    dweight = gradient(tokens, weight, torch.ones(3, features, dtype=torch.bfloat16, device=DEVICE))
    assert dweight[2**17 + 5].eq(2.0).all() and dweight[3].eq(1.0).all()
    assert dweight.sum(dtype=torch.float32) == 3 * features
