"""Forward pass of `attention` for Hopper: one group of warps loads by bulk copies what the others multiply.

It serves the plain case: causal or full, no mask, bias, cap or dropout besides, head size 64 or 128 in 16 bits, and
tokens in whole tiles. A row of the launch table asks for it with "specialized": true; no row does as long as it is not
measured to be faster than the portable kernel. The loop is one, masked throughout under CAUSAL, as Triton 3.6 and 3.7
specialize no kernel with two loops; descriptors are made on the device and warps are 4, else they do not specialize at
all.
Source: Shah et al. 2024 (FlashAttention-3), section 3.1.
"""

from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_memory_given: ContextVar[bool] = ContextVar("_memory_given", default=False)


@triton.jit
def specialized_forward(
    q,
    k,
    v,
    out,
    lse,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    T,
    S,
    heads,
    group,
    score_scale,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one head; T and S are whole tiles, and S >= T under CAUSAL: every query sees key 0."""
    tiles = T // BLOCK_M
    pair = tl.program_id(0) // tiles
    m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g = h // group
    place = m + tl.arange(0, BLOCK_M)
    queries = tl.make_tensor_descriptor(
        q + b * q_b + h * q_h, shape=[T, HEAD], strides=[q_t, 1], block_shape=[BLOCK_M, HEAD]
    )
    keys = tl.make_tensor_descriptor(
        k + b * k_b + g * k_g, shape=[S, HEAD], strides=[k_s, 1], block_shape=[BLOCK_N, HEAD]
    )
    values = tl.make_tensor_descriptor(
        v + b * v_b + g * v_g, shape=[S, HEAD], strides=[v_s, 1], block_shape=[BLOCK_N, HEAD]
    )
    results = tl.make_tensor_descriptor(
        out + (b * T * heads + h) * HEAD, shape=[T, HEAD], strides=[heads * HEAD, 1], block_shape=[BLOCK_M, HEAD]
    )
    q_tile = queries.load([m, 0])
    end = S
    if CAUSAL:
        end = m + BLOCK_M + (S - T)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, HEAD), tl.float32)
    for n in tl.range(0, end, BLOCK_N, warp_specialize=True):
        x = tl.dot(q_tile, keys.load([n, 0]).T)
        if CAUSAL:
            seen = (n + tl.arange(0, BLOCK_N))[None, :] <= (place + (S - T))[:, None]
            x = tl.where(seen, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1) * score_scale)
        p = tl.exp2(x * score_scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        mean = tl.dot(p.to(q_tile.dtype), values.load([n, 0]), mean * decay[:, None])
        top = new_top

    tl.store(lse + pair.to(tl.int64) * T + place, (top + tl.log2(total)) * 0.6931471805599453)
    results.store([m, 0], (mean / total[:, None]).to(q_tile.dtype))


def serves(arguments: dict[str, Any], tiles: dict[str, Any]) -> bool:
    """Return whether the kernel does, in tiles of these settings, what `attention`'s arguments ask for."""
    extras = ("WINDOW", "DOCUMENTS", "LENGTHS", "SOFTCAP", "ALIBI", "DROPOUT")
    T, S = arguments["T"], arguments["S"]
    at_the_end = arguments["offset"] == S - T
    strides = [arguments[name] for name in ("q_b", "q_t", "q_h", "k_b", "k_s", "k_g", "v_b", "v_s", "v_g")]
    return (
        arguments["FOLD"]
        and not any(arguments[name] for name in extras)
        and arguments["HEAD"] in (64, 128)
        and arguments["q"].element_size() == 2
        and T % tiles["BLOCK_M"] == 0
        and S % tiles["BLOCK_N"] == 0
        and ((T <= S and at_the_end) or not arguments["CAUSAL"])
        and all(stride % 8 == 0 for stride in strides)  # bulk copies take 16 bytes at least
        and all(arguments[name].data_ptr() % 16 == 0 for name in ("q", "k", "v"))
    )


def launch_forward(out: Tensor, lse: Tensor, arguments: dict[str, Any], tiles: dict[str, Any]) -> None:
    """Fill out [B, T, H, E] and lse [B, H, T]."""
    q = arguments["q"]
    if q.is_cuda:
        _provide_memory()
    names: tuple[str, ...] = ("q", "k", "v", "q_b", "q_t", "q_h", "k_b", "k_s", "k_g", "v_b", "v_s", "v_g")
    names += ("T", "S", "heads", "group", "score_scale", "CAUSAL", "HEAD")
    specialized_forward[(q.shape[0] * q.shape[2] * (q.shape[1] // tiles["BLOCK_M"]),)](
        out=out, lse=lse, **{name: arguments[name] for name in names}, **tiles
    )


def _provide_memory() -> None:
    """Give Triton the memory for descriptors, which it asks for at the launch: once, in the contexts that it counts."""
    if not _memory_given.get():
        triton.set_allocator(_allocate)
        _memory_given.set(True)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
