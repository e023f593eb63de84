"""Dropout masks inside kernels: element n of a logical tensor is kept or dropped by the same bits as on the CPU.

Element n (row-major linear index in the whole tensor) takes word n % 4 of Philox4x32-10 at counter (low half of
n // 4, high half of n // 4, 0, 0) under a 64-bit key; it is kept where the word's upper 24 bits are at least
ceil(rate * 2^24). Source: Salmon, Moraes, Dror, Shaw 2011, section 3.3.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def threshold(rate: float) -> int:
    """Return what the upper 24 bits of a word must reach for its element to be kept."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout={rate} is no rate; use 0 or more and less than 1")
    return math.ceil(rate * 2**24)


@triton.jit
def words(key, counter):
    """Return the four uint32 words at each int64 counter under the int64 key."""
    key = tl.cast(key, tl.uint64)  # a key of 1 is a constant to the compiler, without methods
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    k0 = zero + (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox_impl(low, high, zero, zero, k0, k1, 10)


@triton.jit
def keep(key, index, limit):
    """Return which elements are kept, for linear indices (int64) of any order; one Philox an element."""
    w0, w1, w2, w3 = words(key, index >> 2)
    place = (index & 3).to(tl.int32)
    word = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    return (word >> 8).to(tl.int32) >= limit


@triton.jit
def keep_quads(key, counter, limit):
    """Return which elements are kept, for whole counters [M, N]: a mask [M, 4 N] of four elements a Philox.

    Element (i, 4 j + w) of the result is word w at counter[i, j].
    """
    w0, w1, w2, w3 = words(key, counter)
    pairs = tl.join(
        tl.join((w0 >> 8).to(tl.int32) >= limit, (w2 >> 8).to(tl.int32) >= limit),
        tl.join((w1 >> 8).to(tl.int32) >= limit, (w3 >> 8).to(tl.int32) >= limit),
    )  # [M, N, 2, 2]: last dim is the low bit of w
    return tl.reshape(pairs, (counter.shape[0], 4 * counter.shape[1]))
