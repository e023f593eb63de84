"""Kernels with one fault each, all of which the compile check must find."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def sound(x):
    tl.store(x, tl.load(x) + 1.0)


@triton.jit
def spilling(x, BLOCK: tl.constexpr):
    """One warp holds 8192 numbers until it knows their sum: 256 a thread, which has 255 registers."""
    at = x + tl.arange(0, BLOCK)
    value = tl.load(at)
    tl.store(at, value / tl.sum(value))


@triton.jit
def too_much_shared(x, y, steps, BLOCK: tl.constexpr):
    """Seven pairs of tiles of 32 KB each wait for their product."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        tile = step * BLOCK * BLOCK
        total += tl.dot(tl.load(x + tile + at), tl.load(y + tile + at))
    tl.store(x + at, total)


@triton.jit
def without_wgmma(x, BLOCK: tl.constexpr):
    """wgmma takes 64 rows or more."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + at)
    tl.store(x + at, tl.dot(value, value))


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    """A range has a power of two of elements."""
    tl.store(x + tl.arange(0, BLOCK), 0.0)


@triton.jit
def forgotten(x):
    tl.store(x, 0.0)


def _empty(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(2**16, dtype=dtype)


def _broken_host_code() -> None:
    raise ValueError("the host code fails")


LAUNCHES: dict[str, Callable[[], None]] = {
    "sound": lambda: sound[(1,)](_empty()),
    "spilling": lambda: spilling[(1,)](_empty(), BLOCK=8192, num_warps=1),
    "shared": lambda: too_much_shared[(1,)](_empty(torch.bfloat16), _empty(torch.bfloat16), 9, BLOCK=128, num_stages=8),
    "wgmma": lambda: without_wgmma[(1,)](_empty(torch.float16), BLOCK=32),
    "wrong": lambda: wrong[(1,)](_empty(), BLOCK=48),
    "host": _broken_host_code,
}
