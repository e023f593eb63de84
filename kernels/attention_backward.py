"""Backward kernels of `attention`: probabilities are made again from the log-sum-exp, tile by tile.

    p = 2^(x - lse log2 e)    dp = do v^T    delta = rowsum(do * out) - dlse    ds = p (dp - delta) cap'(x)
    dq = scale ds k           dk = scale ds^T q                                dv = p^T do

(with dropout: p in dv, and dp, times keep / (1 - rate)). One kernel makes dq, one dk and dv: no sum is shared
between programs, so that every run gives the same bits.
Source: Dao et al. 2022, algorithm 4; Dao 2023, algorithm 2; the term dlse: Liu et al. 2023 (ring attention).
"""

import triton
import triton.language as tl

from megalm.kernels.attention_scores import (
    UNSPECIALIZED,
    inner_tiles,
    kept,
    keys_seen,
    load_rows,
    queries_seeing,
    score,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradients(
    q,
    k,
    v,
    out,
    dout,
    lse,
    dlse,
    bits,
    delta,
    dq,
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
    d_b,
    d_t: tl.constexpr,
    d_h,
    padded,
    T,
    S,
    offset,
    heads,
    group,
    window,
    scale,
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
    WITH_DLSE: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one tile of queries of one head, and what the kernel of the keys, which runs next, needs of its rows.

    That is `bits` = lse log2(e) and `delta`, both fp32 [B, H, padded] with whole tiles of rows: the rows beyond T and
    those that see nothing have bits = inf, so that all their probabilities are 0, and delta = 0.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    pair = tl.program_id(0) // tiles
    m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g = h // group
    row = m.to(tl.int64)
    place = m + tl.arange(0, BLOCK_M)
    own = ((b * T + m) * heads + h) * HEAD
    q_tile = load_rows(q + b * q_b + h * q_h + row * q_t, q_t, T - m, HEAD, BLOCK_M, WIDTH, True)
    dout_tile = load_rows(dout + b * d_b + h * d_h + row * d_t, d_t, T - m, HEAD, BLOCK_M, WIDTH, True)
    out_tile = load_rows(out + own, heads * HEAD, T - m, HEAD, BLOCK_M, WIDTH, True)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g

    statistics = pair.to(tl.int64) * T + place
    lse_M = tl.load(lse + statistics, mask=place < T, other=float("-inf"))
    delta_M = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if WITH_DLSE:
        delta_M -= tl.load(dlse + statistics, mask=place < T, other=0.0)
    seen_nothing = lse_M == float("-inf")
    delta_M = tl.where(seen_nothing, 0.0, delta_M)
    bits_M = tl.where(seen_nothing, float("inf"), lse_M * 1.4426950408889634)
    to_keys = pair.to(tl.int64) * padded + place
    tl.store(bits + to_keys, bits_M)
    tl.store(delta + to_keys, delta_M)

    key_length = S
    if LENGTHS:
        key_length = tl.minimum(S, tl.load(key_lengths + b))
    t = tl.minimum(place, T - 1)
    low, high = keys_seen(t, offset, key_length, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    begin, inner_end = keys_seen(m, offset, key_length, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    last = tl.minimum(m + BLOCK_M, T) - 1
    inner_begin, end = keys_seen(last, offset, key_length, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    begin, inner_begin, inner_end, end = inner_tiles(begin, inner_begin, inner_end, end, BLOCK_N)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + h) * 1.4426950408889634
    first = base + (b * all_heads + h) * rows * columns

    sum_tile = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for n in tl.range(begin, end, BLOCK_N):
        row = tl.cast(n, tl.int64)
        k_tile = load_rows(k + row * k_s, k_s, key_length - n, HEAD, BLOCK_N, WIDTH, True)
        v_tile = load_rows(v + row * v_s, v_s, key_length - n, HEAD, BLOCK_N, WIDTH, True)
        s = n + tl.arange(0, BLOCK_N)[None, :]
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        x, steepness = score(x, (t + offset)[:, None] - s, score_scale, cap, slope, SOFTCAP, ALIBI)
        p = tl.exp2(x - bits_M[:, None])
        if (n < inner_begin) | (n >= inner_end):
            seen = s < high[:, None]
            if WINDOW or DOCUMENTS:
                seen = seen & (s >= low[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(key, limit, first + n, t.to(tl.int64), columns, BLOCK_N, QUADS)
            dp = tl.where(keep, dp * rescale, 0.0)
        ds = p * (dp - delta_M[:, None])
        if SOFTCAP:
            ds *= steepness
        sum_tile = tl.dot(ds.to(k_tile.dtype), k_tile, sum_tile, input_precision=PRECISION)

    store_rows(dq + own, heads * HEAD, sum_tile * scale, T - m, HEAD, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_gradients(
    q,
    k,
    v,
    dout,
    bits,
    delta,
    dk,
    dv,
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
    d_b,
    d_t: tl.constexpr,
    d_h,
    padded,
    B,
    T,
    S,
    offset,
    heads,
    group,
    shares,
    window,
    scale,
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
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile of keys, summed over one share of the query heads that read it: [shares, B, S, G, E].

    Tiles are [keys, queries] here, so that p^T and ds^T are left operands as they come. The rows of keys beyond the
    key length hold anything until they are stored as zeros; no other row depends on them.
    """
    tiles = tl.cdiv(S, BLOCK_N)
    rest = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BLOCK_N
    share = rest % shares
    groups = heads // group
    b, g = (rest // shares // groups).to(tl.int64), (rest // shares % groups).to(tl.int64)
    row = n.to(tl.int64)
    key_length = S
    if LENGTHS:
        key_length = tl.minimum(S, tl.load(key_lengths + b))
    k_tile = load_rows(k + b * k_b + g * k_g + row * k_s, k_s, key_length - n, HEAD, BLOCK_N, WIDTH, True)
    v_tile = load_rows(v + b * v_b + g * v_g + row * v_s, v_s, key_length - n, HEAD, BLOCK_N, WIDTH, True)

    s = tl.minimum(n + tl.arange(0, BLOCK_N), S - 1)
    low, high = queries_seeing(s, T, offset, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    begin, inner_end = queries_seeing(n, T, offset, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    last = tl.minimum(n + BLOCK_N, S) - 1
    inner_begin, end = queries_seeing(last, T, offset, window, starts, ends, CAUSAL, WINDOW, DOCUMENTS)
    if LENGTHS:
        end = tl.where(n < key_length, end, 0)
    begin, inner_begin, inner_end, end = inner_tiles(begin, inner_begin, inner_end, end, BLOCK_M)

    dk_tile = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for turn in tl.range(0, group // shares):
        h = g * group + share * (group // shares) + tl.cast(turn, tl.int64)
        q_head, dout_head = q + b * q_b + h * q_h, dout + b * d_b + h * d_h
        bits_head, delta_head = bits + (b * heads + h) * padded, delta + (b * heads + h) * padded
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + h) * 1.4426950408889634
        first = base + (b * all_heads + h) * rows * columns + n
        for m in tl.range(begin, end, BLOCK_M):
            row = tl.cast(m, tl.int64)
            place = m + tl.arange(0, BLOCK_M)
            q_tile = load_rows(q_head + row * q_t, q_t, T - m, HEAD, BLOCK_M, WIDTH, True)
            dout_tile = load_rows(dout_head + row * d_t, d_t, T - m, HEAD, BLOCK_M, WIDTH, True)
            bits_M, delta_M = tl.load(bits_head + place), tl.load(delta_head + place)
            x = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            distance = (place + offset)[None, :] - s[:, None]
            x, steepness = score(x, distance, score_scale, cap, slope, SOFTCAP, ALIBI)
            p = tl.exp2(x - bits_M[None, :])
            if (CAUSAL or WINDOW or DOCUMENTS) and ((m < inner_begin) | (m >= inner_end)):
                seen = place >= low[:, None]
                if WINDOW or DOCUMENTS:
                    seen = seen & (place < high[:, None])
                p = tl.where(seen, p, 0.0)
            dropped = p
            if DROPOUT:
                keep = tl.trans(kept(key, limit, first, place.to(tl.int64), columns, BLOCK_N, QUADS))
                dropped = tl.where(keep, p * rescale, 0.0)
            dv_tile = tl.dot(dropped.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
            ds = dropped * dp - p * delta_M[None, :]
            if SOFTCAP:
                ds *= steepness
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)

    real = (n + tl.arange(0, BLOCK_N) < key_length)[:, None]
    own = (((share * B + b) * S + n) * groups + g) * HEAD
    store_rows(dk + own, groups * HEAD, tl.where(real, dk_tile * scale, 0.0), S - n, HEAD, BLOCK_N, WIDTH)
    store_rows(dv + own, groups * HEAD, tl.where(real, dv_tile, 0.0), S - n, HEAD, BLOCK_N, WIDTH)
