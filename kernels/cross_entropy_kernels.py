"""The kernels of `cross_entropy` and `linear_cross_entropy`: statistics of rows of logits, and their gradient in place.

A row begins anywhere: its elements are read and written in vectors of 16 bytes from the last 16-byte border before it,
masked at both ends alone, so that an odd vocabulary is as fast as an even one.
"""

import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch

_VECTOR_BYTES = tl.constexpr(16)


@triton.jit
def _lead(row, ALIGNED: tl.constexpr):
    """Return how many elements the row begins after a 16-byte border."""
    if ALIGNED:
        lead = 0
    else:
        SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
        lead = ((row.to(tl.int64) // SIZE) % (_VECTOR_BYTES // SIZE)).to(tl.int32)
    return lead


@triton.jit
def _merge(x, peak, total):
    """Return the maxima and the sums of exponentials relative to them, of each lane's past and of a tile's column."""
    top = tl.maximum(peak, tl.max(x, axis=0))
    shift = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is no number; +inf - +inf must be none
    total = total * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift[None, :]), axis=0)
    return top, total


@triton.jit(do_not_specialize=["first_column", "rows"])
def _statistics(
    logits,
    targets,
    statistics,
    stride,
    columns,
    first_column,
    rows,
    MERGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row: its [4] statistics, merged with those that are there already if MERGE.

    A tile is [DEPTH, LANES] and reduced over its depth alone, which a thread holds: threads meet once, at the end.
    """
    BLOCK: tl.constexpr = DEPTH * LANES
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    lead = _lead(row, ALIGNED)
    border = tl.multiple_of(row - lead, _VECTOR_BYTES)
    length = columns + lead
    place = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)

    begin = 0
    if not ALIGNED:
        inside = (place >= lead) & (place < length)
        x = tl.load(border + place, mask=inside, other=float("-inf")).to(tl.float32)
        peak, total = _merge(x, peak, total)
        plain += tl.sum(tl.where(inside, x, 0.0), axis=0)
        begin = BLOCK
    end = length // BLOCK * BLOCK
    for at in range(begin, end, BLOCK):
        x = tl.load(border + at + place).to(tl.float32)
        peak, total = _merge(x, peak, total)
        plain += tl.sum(x, axis=0)
    if (end >= begin) & (end < length):
        inside = place < length - end
        x = tl.load(border + end + place, mask=inside, other=float("-inf")).to(tl.float32)
        peak, total = _merge(x, peak, total)
        plain += tl.sum(tl.where(inside, x, 0.0), axis=0)

    top = tl.max(peak, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.sum(total * tl.exp(peak - shift), axis=0)
    logit_sum = tl.sum(plain, axis=0)
    target = tl.load(targets + n) - first_column
    held = (target >= 0) & (target < columns)
    target_logit = tl.load(row + target, mask=held, other=0.0).to(tl.float32)
    out = statistics + n
    if MERGE:
        before = tl.load(out)
        both = tl.maximum(before, top)
        shift = tl.where(both == float("-inf"), 0.0, both)
        whole = whole * tl.exp(top - shift) + tl.load(out + rows) * tl.exp(before - shift)
        top = both
        target_logit += tl.load(out + rows * 2)
        logit_sum += tl.load(out + rows * 3)
    tl.store(out, top)
    tl.store(out + rows, whole)
    tl.store(out + rows * 2, target_logit)
    tl.store(out + rows * 3, logit_sum)


@triton.jit
def _slope(x, column, target, lse, rest, grad, smoothing, share, z_loss):
    """Return the gradient of one row's logits: what is small where the target's p is nearly 1 is added apart."""
    p = tl.exp((x - lse) - rest)
    at_target = tl.where(column == target, 1.0, 0.0)
    return grad * ((p - at_target) + (2.0 * z_loss * lse) * p + (smoothing * at_target - share))


@triton.jit(do_not_specialize=["first_column"])
def _gradient(
    logits,
    targets,
    lses,
    rests,
    grads,
    stride,
    columns,
    width,
    first_column,
    smoothing,
    share,
    z_loss,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: the logits of `columns` columns become their gradient, the others of `width` become 0."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    lead = _lead(row, ALIGNED)
    grad = tl.load(grads + n)
    lse = tl.load(lses + n)
    rest = tl.load(rests + n)
    target = (tl.load(targets + n) - first_column).to(tl.int32)
    at = tl.program_id(1) * BLOCK
    pointers = tl.multiple_of(row - lead, _VECTOR_BYTES) + at + tl.arange(0, BLOCK)
    column = at - lead + tl.arange(0, BLOCK)
    inside = column < width if ALIGNED else (column >= 0) & (column < width)
    if grad == 0.0:  # the logits are not read
        tl.store(pointers, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=inside)
    elif (at >= lead) & (at - lead + BLOCK <= columns):
        x = tl.load(pointers).to(tl.float32)
        dx = _slope(x, column, target, lse, rest, grad, smoothing, share, z_loss)
        tl.store(pointers, dx.to(logits.dtype.element_ty))
    else:
        real = column < columns
        x = tl.load(pointers, mask=inside & real, other=0.0).to(tl.float32)
        dx = _slope(x, column, target, lse, rest, grad, smoothing, share, z_loss)
        tl.store(pointers, tl.where(real, dx, 0.0).to(logits.dtype.element_ty), mask=inside)


def _aligned(logits: Tensor) -> bool:
    """Return whether every row begins at a 16-byte border."""
    bytes_of_stride = logits.stride(0) * logits.element_size() if logits.shape[0] > 1 else 0
    return logits.data_ptr() % _VECTOR_BYTES.value == 0 and bytes_of_stride % _VECTOR_BYTES.value == 0


def launch_statistics(
    logits_NV: Tensor, targets_N: Tensor, statistics_4N: Tensor, columns: int, first_column: int = 0
) -> None:
    """Write the statistics of logits that are `columns` columns of rows; merge them if these are not the first ones.

    Targets count from column 0 of the row, of which the logits' first column is number `first_column`.
    """
    rows = logits_NV.shape[0]
    if rows == 0:
        return
    _statistics[(rows,)](
        logits_NV,
        targets_N,
        statistics_4N,
        logits_NV.stride(0),
        columns,
        first_column,
        rows,
        MERGE=first_column > 0,
        ALIGNED=_aligned(logits_NV),
        **launch.settings("cross_entropy", "statistics", columns),
    )


def launch_gradient(
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    lse_rest_N: Tensor,
    grad_N: Tensor,
    *,
    columns: int,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
    first_column: int = 0,
) -> None:
    """Overwrite logits by their gradient; see `cross_entropy_gradient_` and, for the columns, `launch_statistics`."""
    rows, width = logits_NV.shape
    if rows == 0 or width == 0:
        return
    chosen = launch.settings("cross_entropy", "gradient", width)
    aligned = _aligned(logits_NV)
    most = width if aligned else width + _VECTOR_BYTES.value // logits_NV.element_size() - 1
    _gradient[(rows, triton.cdiv(most, chosen["BLOCK"]))](
        logits_NV,
        targets_N,
        lse_N,
        lse_rest_N,
        grad_N,
        logits_NV.stride(0),
        columns,
        width,
        first_column,
        label_smoothing,
        label_smoothing / vocab,
        z_loss,
        ALIGNED=aligned,
        **chosen,
    )


def has_plain_rows(logits: Tensor) -> bool:
    """Return whether rows are runs of memory that do not overlap."""
    rows, width = logits.shape
    return (width <= 1 or logits.stride(1) == 1) and (rows <= 1 or logits.stride(0) >= width)
