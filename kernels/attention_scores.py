"""What a score is to every kernel of `attention`: which keys a query sees, cap, bias and dropout of one tile.

Query t of T stands at the place t + `offset` among the S keys: S - T puts the last query at the last key. Every mask
(causal, window, documents, key lengths) lets a query see one interval of keys that moves up with t, and a key be seen
by one interval of queries. A kernel thus visits one run of tiles, all of whose inner tiles need no mask.

Scores are kept times log2(e) here, as exp2 is what the hardware has.
Source: Dao 2023 (FlashAttention-2), section 3; Beltagy et al. 2020 for the window; Press et al. 2022 for the bias.
"""

import triton
import triton.language as tl

from megalm.kernels import philox

UNSPECIALIZED = ("offset", "window", "key", "limit", "base", "all_heads", "rows")
"""Arguments that change from step to step or layer to layer: Triton compiles no kernel of its own for an odd value."""


@triton.jit
def keys_seen(
    t, offset, key_length, window, starts, ends, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Return (low, high): query t sees the keys low .. high - 1, none where high <= low. t is a scalar or a block."""
    place = t + offset
    low = place * 0
    high = low + key_length
    if CAUSAL:
        high = tl.minimum(high, place + 1)
    if WINDOW:
        low = tl.maximum(low, place - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, place + window)
    if DOCUMENTS:
        low = tl.maximum(low, tl.load(starts + t))
        high = tl.minimum(high, tl.load(ends + t))
    return low, high


@triton.jit
def queries_seeing(
    s, T, offset, window, starts, ends, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Return (first, stop): key s is seen by the queries first .. stop - 1 of T. s is a scalar or a block."""
    place = s - offset
    first = place * 0
    stop = first + T
    if CAUSAL:
        first = tl.maximum(first, place)
    if WINDOW:
        stop = tl.minimum(stop, place + window)
        if not CAUSAL:
            first = tl.maximum(first, place - window + 1)
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(starts + s))
        stop = tl.minimum(stop, tl.load(ends + s))
    return first, stop


@triton.jit
def inner_tiles(begin, inner_begin, inner_end, end, BLOCK: tl.constexpr):
    """Return where to cut a run of tiles: [begin, a) and [b, end) need a mask, the tiles of [a, b) do not.

    [begin, end) has something to see, [inner_begin, inner_end) is seen in full. All are tiles' first places but `end`.
    """
    begin = begin // BLOCK * BLOCK
    end = tl.maximum(end, begin)
    a = tl.minimum(tl.maximum(tl.cdiv(inner_begin, BLOCK) * BLOCK, begin), end)
    b = tl.maximum(tl.maximum(inner_end, 0) // BLOCK * BLOCK, a)
    return begin, a, tl.minimum(b, end), end


@triton.jit
def load_rows(base, stride, count, HEAD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """Return [ROWS, WIDTH] of rows of HEAD numbers; zeros beyond HEAD and, if BOUNDED, beyond `count` rows."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    places = base + row * stride + column
    if BOUNDED and HEAD != WIDTH:
        tile = tl.load(places, mask=(row < count) & (column < HEAD), other=0.0)
    elif BOUNDED:
        tile = tl.load(places, mask=row < count, other=0.0)
    elif HEAD != WIDTH:
        tile = tl.load(places, mask=column < HEAD, other=0.0)
    else:
        tile = tl.load(places)
    return tile


@triton.jit
def store_rows(base, stride, tile, count, HEAD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store the first `count` rows and HEAD columns of a tile, rounded to the target's dtype."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(base + row * stride + column, tile.to(base.dtype.element_ty), mask=(row < count) & (column < HEAD))


@triton.jit
def tanh(x):
    """Return tanh(x) to fp32 accuracy, small x included: a polynomial below 0.625 (Cephes), exp2 above."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    size = tl.abs(x)
    large = 1.0 - 2.0 / (1.0 + tl.exp2(size * 2.8853900817779268))
    return tl.where(size < 0.625, x + x * square * series, tl.where(x < 0.0, -large, large))


@triton.jit
def score(product, distance, scale, cap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Return (score, slope of the cap): cap * tanh(product * scale) or product * scale, minus slope * |distance|."""
    x = product * scale
    steepness = x
    if SOFTCAP:
        turned = tanh(x)
        x = turned * cap
        steepness = 1.0 - turned * turned
    if ALIBI:
        x -= slope * tl.abs(distance).to(tl.float32)
    return x, steepness


@triton.jit
def kept(key, limit, first, t, S, N: tl.constexpr, QUADS: tl.constexpr):
    """Return which probabilities [t, N] are kept: element (t, j) has the index first + t * S + j (int64 t, first)."""
    if QUADS:
        counter = ((first + t * S) >> 2)[:, None] + tl.arange(0, N // 4)[None, :]
        keep = philox.keep_quads(key, counter, limit)
    else:
        keep = philox.keep(key, (first + t * S)[:, None] + tl.arange(0, N)[None, :], limit)
    return keep
