"""Forward kernel of `attention`: a tile of queries goes once over the keys that it sees, with an online softmax.

For every tile of keys:  m' = max(m, rowmax x)   p = 2^(x - m')   l = l 2^(m - m') + rowsum p   o = o 2^(m - m') + p v
and at the end  out = o / l,  lse = (m + log2 l) ln 2.
Source: Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1; Dao 2023, algorithm 1.
"""

import triton
import triton.language as tl

from megalm.kernels.attention_scores import (
    UNSPECIALIZED,
    inner_tiles,
    kept,
    keys_seen,
    load_rows,
    score,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward(
    q,
    k,
    v,
    out,
    lse,
    slopes,
    starts,
    ends,
    key_lengths,
    q_b,
    q_t: tl.constexpr,
    q_h,
    k_b,
    k_s: tl.constexpr,
    k_g,
    v_b,
    v_s: tl.constexpr,
    v_g,
    T,
    S,
    offset,
    heads,
    group,
    window,
    score_scale,
    cap,
    key: tl.int64,
    limit,
    base: tl.int64,
    all_heads,
    rows,
    columns,
    rescale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one head, the tiles with most keys (last under CAUSAL) first: fewer stragglers at the end.

    Neighbouring programs work on one head, whose keys and values they share in the cache.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    pair = tl.program_id(0) // tiles
    m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g = h // group
    row = m.to(tl.int64)
    q_tile = load_rows(q + b * q_b + h * q_h + row * q_t, q_t, T - m, HEAD, BLOCK_M, WIDTH, True)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g

    key_length = S
    if LENGTHS:
        key_length = tl.minimum(S, tl.load(key_lengths + b))
    t = tl.minimum(m + tl.arange(0, BLOCK_M), T - 1)
    low, high = keys_seen(t, offset, key_length, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    begin, inner_end = keys_seen(m, offset, key_length, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    last = tl.minimum(m + BLOCK_M, T) - 1
    inner_begin, end = keys_seen(last, offset, key_length, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    begin, inner_begin, inner_end, end = inner_tiles(begin, inner_begin, inner_end, end, BLOCK_N)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + h) * 1.4426950408889634
    first = base + (b * all_heads + h) * rows * columns

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for n in tl.range(begin, end, BLOCK_N):
        row = tl.cast(n, tl.int64)
        k_tile = load_rows(k + row * k_s, k_s, key_length - n, HEAD, BLOCK_N, WIDTH, True)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = n + tl.arange(0, BLOCK_N)[None, :]
        factor = 1.0
        if FOLD:  # a scale above 0 goes into the exponent's multiply-add, and out of the maximum
            factor = score_scale
        else:
            x, _ = score(x, (t + offset)[:, None] - s, score_scale, cap, slope, SOFTCAP, ALIBI)
        if (n < inner_begin) | (n >= inner_end):
            seen = s < high[:, None]
            if WINDOW or DOCUMENTS:
                seen = seen & (s >= low[:, None])
            x = tl.where(seen, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1) * factor)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # where nothing was seen yet: -inf - -inf is NaN
        p = tl.exp2(x * factor - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(key, limit, first + n, t.to(tl.int64), columns, BLOCK_N, QUADS), p, 0.0)
        v_tile = load_rows(v + row * v_s, v_s, key_length - n, HEAD, BLOCK_N, WIDTH, True)
        mean = tl.dot(p.to(v_tile.dtype), v_tile, mean * decay[:, None], input_precision=PRECISION)
        top = new_top

    total = tl.where(total == 0.0, 1.0, total)  # nothing seen: mean is 0 and top -inf
    mean *= (rescale / total)[:, None]
    place = m + tl.arange(0, BLOCK_M)
    tl.store(lse + pair.to(tl.int64) * T + place, (top + tl.log2(total)) * 0.6931471805599453, mask=place < T)
    out += ((b * T + m) * heads + h) * HEAD
    store_rows(out, heads * HEAD, mean, T - m, HEAD, BLOCK_M, WIDTH)
