"""The Triton kernels of LayerNorm and RMSNorm; `norm` has their formulas and launches them.

Names as there: s is `value` or `source`, m `mean` or `middle`, r `rstd` or `root`, h the normalised value, g = w dy.
"""

import triton
import triton.language as tl

from megalm.kernels import philox

_UNSPECIALIZED = ["rows", "key", "limit", "origin", "tokens", "gap"]


@triton.jit
def _kept(row, first, features, draw, GAP: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of the columns from `first` on are kept: [ROWS, BLOCK]; GAP: `gap` rows lie between samples."""
    key, limit, _, origin, tokens, gap = draw
    place = origin + row
    if GAP:
        place += (row // tokens) * gap
    start = place * features + first
    if QUADS:  # features and first are multiples of 4
        return philox.keep_quads(key, (start >> 2)[:, None] + tl.arange(0, BLOCK // 4)[None, :], limit)
    return philox.keep(key, start[:, None] + tl.arange(0, BLOCK)[None, :], limit)


@triton.jit
def _summed(
    inputs,
    total,
    row,
    first,
    inside,
    features,
    draw,
    DROPOUT: tl.constexpr,
    GAP: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is normalised, in fp32 and 0 outside: x, or the rounded sum, which is stored in `total`."""
    x, x_stride, residual, residual_stride, row_bias = inputs
    column = first + tl.arange(0, BLOCK)
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        if row_bias is not None:
            value += tl.load(row_bias + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
        if DROPOUT:
            value = tl.where(_kept(row, first, features, draw, GAP, QUADS, BLOCK), value * draw[2], 0.0)
        place = row[:, None] * residual_stride + column[None, :]
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * features + column[None, :], rounded, mask=inside)
        value = tl.where(inside, rounded.to(tl.float32), 0.0)
    return value


@triton.jit
def _store_normed(y, value, mean, rstd, weight, bias, row, column, inside, features, CENTRED: tl.constexpr):
    """Store (value - mean) rstd weight + bias."""
    if CENTRED:
        value -= mean[:, None]
    real = column < features
    value *= rstd[:, None]
    value *= tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * features + column[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward(
    x,
    residual,
    row_bias,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    features,
    x_stride,
    residual_stride,
    eps,
    key: tl.int64,
    limit,
    scale,
    origin,
    tokens,
    gap,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    GAP: tl.constexpr,
    QUADS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows a program: WHOLE, at once in registers; else read twice in blocks, and ROWS is 1.

    In blocks each lane keeps a mean and a sum of squares of its own, which are put together after the last.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    real = (row < rows)[:, None]
    inputs = (x, x_stride, residual, residual_stride, row_bias)
    draw = (key, limit, scale, origin, tokens, gap)
    if WHOLE:
        inside = real & (lane < features)[None, :]
        value = _summed(inputs, total, row, 0, inside, features, draw, DROPOUT, GAP, QUADS, BLOCK)
        middle = tl.sum(value, 1) / features
        deviation = value
        if CENTRED:
            deviation = tl.where(inside, value - middle[:, None], 0.0)
        squares = deviation * deviation
    else:
        means = tl.zeros((ROWS, BLOCK), tl.float32)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        blocks = 0.0
        for first in tl.range(0, features, BLOCK, num_stages=STAGES):
            inside = real & (first + lane < features)[None, :]
            value = _summed(inputs, total, row, first, inside, features, draw, DROPOUT, GAP, QUADS, BLOCK)
            before = value
            if CENTRED:
                blocks += 1.0
                before = tl.where(inside, value - means, 0.0)
                means += before / blocks
                value = tl.where(inside, value - means, 0.0)
            squares += before * value
        middle = tl.zeros((ROWS,), tl.float32)
        if CENTRED:
            counts = ((features - lane + BLOCK - 1) // BLOCK).to(tl.float32)[None, :]
            middle = tl.sum(means * counts, 1) / features
            squares += counts * (means - middle[:, None]) * (means - middle[:, None])
    root = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1) / features + eps))
    tl.store(rstd + row, root, mask=row < rows)
    if CENTRED:
        tl.store(mean + row, middle, mask=row < rows)
    if WHOLE:
        _store_normed(y, value, middle, root, weight, bias, row, lane, inside, features, CENTRED)
    else:
        source, stride = x, x_stride
        if residual is not None:
            tl.debug_barrier()  # what is read below was stored by other threads of this program
            source, stride = total, features
        for first in tl.range(0, features, BLOCK, num_stages=STAGES):
            column = first + lane
            inside = real & (column < features)[None, :]
            value = tl.load(source + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            _store_normed(y, value, middle, root, weight, bias, row, column, inside, features, CENTRED)


@triton.jit
def _read(dy, dy_stride, source, source_stride, mean, rstd, row, rows, column, inside, CENTRED: tl.constexpr):
    """dy, h [ROWS, BLOCK] and r [ROWS] in fp32; dy is 0 outside, which makes all that is summed 0 there."""
    upstream = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.load(source + row[:, None] * source_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    root = tl.load(rstd + row, mask=row < rows, other=0.0)
    if CENTRED:
        value -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    return upstream, value * root[:, None], root


@triton.jit(do_not_specialize=["rows"])
def row_means(
    dy,
    source,
    weight,
    mean,
    rstd,
    means,
    rows,
    features,
    dy_stride,
    source_stride,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean(g h) and mean(g) of one row a program, for rows that do not fit into registers: means [2, rows]."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    products = tl.zeros((1, BLOCK), tl.float32)
    plain = tl.zeros((1, BLOCK), tl.float32)
    for first in tl.range(0, features, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = (column < features)[None, :]
        g, h, _ = _read(dy, dy_stride, source, source_stride, mean, rstd, row, rows, column, inside, CENTRED)
        g *= tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
        products += g * h
        plain += g
    tl.store(means + row, tl.sum(products, 1) / features)
    if CENTRED:
        tl.store(means + rows + row, tl.sum(plain, 1) / features)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward(
    dy,
    d_total,
    source,
    weight,
    mean,
    rstd,
    means,
    dx,
    d_residual,
    partial,
    rows,
    features,
    dy_stride,
    d_total_stride,
    source_stride,
    key: tl.int64,
    limit,
    scale,
    origin,
    tokens,
    gap,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    GAP: tl.constexpr,
    QUADS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROW_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of every num_programs(0)-th tile of rows; `means` is None where a tile holds whole rows.

    `partial` [WEIGHT + BIAS + ROW_BIAS, programs, features] takes the program's sums over its rows.
    """
    share, shares = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    real = (column < features)[None, :]
    w = tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_row_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(share, tl.cdiv(rows, ROWS), shares, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & real
        g, h, root = _read(dy, dy_stride, source, source_stride, mean, rstd, row, rows, column, inside, CENTRED)
        if WEIGHT:
            d_weight += g * h
        if BIAS:
            d_bias += g
        g *= w
        along = tl.sum(g * h, 1) / features if means is None else tl.load(means + row, row < rows, 0.0)
        ds = g - h * along[:, None]
        if CENTRED:
            middle = tl.sum(g, 1) / features if means is None else tl.load(means + rows + row, row < rows, 0.0)
            ds -= middle[:, None]
        ds *= root[:, None]
        if d_total is not None:
            place = row[:, None] * d_total_stride + column[None, :]
            ds += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
        place = row[:, None] * features + column[None, :]
        if DROPOUT:
            tl.store(d_residual + place, ds.to(d_residual.dtype.element_ty), mask=inside)
            draw = (key, limit, scale, origin, tokens, gap)
            kept = _kept(row, first, features, draw, GAP, QUADS, BLOCK)
            ds = tl.where(kept, ds * scale, 0.0)
        if ROW_BIAS:
            d_row_bias += ds
        tl.store(dx + place, ds.to(dx.dtype.element_ty), mask=inside)
    at = partial + share.to(tl.int64) * features + column
    step = shares.to(tl.int64) * features
    if WEIGHT:
        tl.store(at, tl.sum(d_weight, 0), mask=column < features)
    if BIAS:
        tl.store(at + WEIGHT * step, tl.sum(d_bias, 0), mask=column < features)
    if ROW_BIAS:
        tl.store(at + (WEIGHT + BIAS) * step, tl.sum(d_row_bias, 0), mask=column < features)


@triton.jit
def add_partial(partial, first_out, second_out, third_out, shares, features, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one of the sums that `backward` left, over all its programs."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = column < features
    which = tl.program_id(1)
    at = partial + which.to(tl.int64) * shares * features
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, shares, ROWS):
        share = first + tl.arange(0, ROWS)
        place = share.to(tl.int64)[:, None] * features + column[None, :]
        total += tl.load(at + place, mask=(share < shares)[:, None] & real[None, :], other=0.0)
    result = tl.sum(total, 0)
    tl.store(first_out + column, result.to(first_out.dtype.element_ty), mask=real & (which == 0))
    if second_out is not None:
        tl.store(second_out + column, result.to(second_out.dtype.element_ty), mask=real & (which == 1))
    if third_out is not None:
        tl.store(third_out + column, result.to(third_out.dtype.element_ty), mask=real & (which == 2))
