"""Masks drawn inside kernels are those that the CPU path draws."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from megalm.distributed.random import keep_slice
from megalm.kernels import philox
from megalm.kernels.launch import signed_key

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def draw_each(out, key, first, limit, N: tl.constexpr):
    index = first + tl.arange(0, N).to(tl.int64)
    tl.store(out + tl.arange(0, N), philox.keep(key, index, limit))


@triton.jit
def draw_quads(out, key, first, limit, M: tl.constexpr, N: tl.constexpr):
    counter = (first >> 2) + (tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]).to(tl.int64)
    places = tl.arange(0, M)[:, None] * 4 * N + tl.arange(0, 4 * N)[None, :]
    tl.store(out + places, philox.keep_quads(key, counter, limit))


@pytest.mark.parametrize("first", [0, 4, 2**34 - 64, 2**40 + 8])
@pytest.mark.parametrize("key", [5, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.75])
def test_kernels_keep_the_elements_that_the_cpu_path_keeps(first: int, key: int, rate: float) -> None:
    expected = keep_slice(key, rate, (first + 128,), (first,), (128,), torch.device("cpu"))
    each = torch.empty(128, dtype=torch.bool, device=DEVICE)
    quads = torch.empty_like(each)
    draw_each[(1,)](each, signed_key(key), first, philox.threshold(rate), N=128)
    draw_quads[(1,)](quads, signed_key(key), first, philox.threshold(rate), M=8, N=4)
    assert torch.equal(each.cpu(), expected) and torch.equal(quads.cpu(), expected)


def test_a_rate_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout=1\.0 is no rate; use 0 or more and less than 1"):
        philox.threshold(1.0)
