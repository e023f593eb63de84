"""Softmax over the last dim of scaled scores, of which a mask and causality may hide a part.

    z = scale x where visible, -inf elsewhere;   y = exp(z - max(z)) / sum(exp(z - max(z)))
    dx = scale y (dy - sum(dy y))

Rows of up to TILE columns (of the launch table) are read once, several short ones a program. Longer ones go through in
blocks twice, the second time from the cache: first each lane keeps a maximum and a sum of its own, then the values are
computed from those put together. Computed in fp32, in natural powers: those of 2 would round scale x log2(e), and that
shows in the largest. Kept for the backward pass is y alone.
What lies right of the diagonal of a causal softmax is not read, but for what shares 16 elements with the visible part.
Sources: Milakov and Gimelshein 2018 for the running maximum; Megatron-LM has the same operation as a CUDA kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference

_SHAPE = ["rows", "queries"]


@triton.jit
def _places(rows, queries, keys, CAUSAL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """(row, outer, t, end): the program's rows, their places in [outer, queries], how many keys are visible, 0 or more.

    `end` is 0 for rows that are not there. Row numbers take 64 bits only where WIDE: the divisions would be slow.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    outer = row // queries
    t = row - outer * queries
    end = tl.zeros((ROWS,), tl.int32) + keys
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(t + (keys - queries + 1), 0).to(tl.int32))
    return row, outer, t, tl.where(row < rows, end, 0)


@triton.jit
def _far(place, step):
    """An offset in 64 bits."""
    return place.to(tl.int64) * step


@triton.jit
def _near(column, end, keys):
    """What is read: the visible columns and those beside them, in groups of 16, so that whole groups are one access."""
    return (column // 16 * 16 < end[:, None]) & (column < keys)


@triton.jit
def _logits(x, mask, mask_step, column, end, keys, scale):
    """z at [ROWS, BLOCK]; x and mask point to the rows."""
    near = _near(column, end, keys)
    visible = column < end[:, None]
    if mask is not None:
        visible = visible & (tl.load(mask[:, None] + _far(column, mask_step), mask=near, other=0) != 0)
    value = tl.load(x[:, None] + column, mask=near, other=0.0).to(tl.float32)
    return tl.where(visible, value * scale, float("-inf"))


@triton.jit
def _finite(top):
    """A maximum that can be subtracted: 0 for -inf, of which nothing is visible."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=_SHAPE)
def _forward(
    x,
    mask,
    y,
    rows,
    queries,
    keys,
    x_outer,
    x_row,
    mask_inner_size,
    mask_outer,
    mask_inner,
    mask_row,
    mask_step,
    scale,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows a program: WHOLE, at once in registers; else in blocks, and ROWS is 1."""
    row, outer, t, end = _places(rows, queries, keys, CAUSAL, WIDE, ROWS)
    x += _far(outer, x_outer) + _far(t, x_row)
    if mask is not None:
        first = outer // mask_inner_size
        mask += _far(first, mask_outer) + _far(outer - first * mask_inner_size, mask_inner) + _far(t, mask_row)
    y += _far(row, keys)
    lane = tl.arange(0, BLOCK)[None, :]
    real = (row < rows)[:, None]
    if WHOLE:
        z = _logits(x, mask, mask_step, lane, end, keys, scale)
        power = tl.exp(z - _finite(tl.max(z, 1))[:, None])
        total = tl.sum(power, 1)
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        tl.store(y[:, None] + lane, (power * share[:, None]).to(y.dtype.element_ty), mask=real & (lane < keys))
    else:
        tops = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
        totals = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.range(0, tl.max(end, 0), BLOCK, num_stages=STAGES):
            z = _logits(x, mask, mask_step, first + lane, end, keys, scale)
            higher = tl.maximum(tops, z)
            shift = _finite(higher)
            totals = totals * tl.exp(tops - shift) + tl.exp(z - shift)
            tops = higher
        top = _finite(tl.max(tops, 1))[:, None]
        total = tl.sum(totals * tl.exp(tops - top), 1)
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        for first in tl.range(0, keys, BLOCK, num_stages=STAGES):
            column = first + lane
            z = _logits(x, mask, mask_step, column, end, keys, scale)
            value = tl.exp(z - top) * share[:, None]
            tl.store(y[:, None] + column, value.to(y.dtype.element_ty), mask=real & (column < keys))


@triton.jit(do_not_specialize=_SHAPE)
def _backward(
    dy,
    y,
    dx,
    rows,
    queries,
    keys,
    dy_outer,
    dy_row,
    scale,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows a program, as `_forward`; what `mask` hides has y = 0."""
    row, outer, t, end = _places(rows, queries, keys, CAUSAL, WIDE, ROWS)
    dy += _far(outer, dy_outer) + _far(t, dy_row)
    y += _far(row, keys)
    dx += _far(row, keys)
    lane = tl.arange(0, BLOCK)[None, :]
    real = (row < rows)[:, None]
    if WHOLE:
        upstream, value = _pair(dy, y, lane, end, keys)
        gradient = scale * value * (upstream - tl.sum(upstream * value, 1)[:, None])
        tl.store(dx[:, None] + lane, gradient.to(dx.dtype.element_ty), mask=real & (lane < keys))
    else:
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.range(0, tl.max(end, 0), BLOCK, num_stages=STAGES):
            upstream, value = _pair(dy, y, first + lane, end, keys)
            products += upstream * value
        total = tl.sum(products, 1)[:, None]
        for first in tl.range(0, keys, BLOCK, num_stages=STAGES):
            column = first + lane
            upstream, value = _pair(dy, y, column, end, keys)
            gradient = scale * value * (upstream - total)
            tl.store(dx[:, None] + column, gradient.to(dx.dtype.element_ty), mask=real & (column < keys))


@triton.jit
def _pair(dy, y, column, end, keys):
    """dy and y at [ROWS, BLOCK] in fp32, 0 where nothing is visible."""
    near = _near(column, end, keys)
    upstream = tl.load(dy[:, None] + column, mask=near, other=0.0).to(tl.float32)
    value = tl.load(y[:, None] + column, mask=near, other=0.0).to(tl.float32)
    return tl.where(column < end[:, None], upstream, 0.0), value


def _planes(x: Tensor) -> Tensor:
    """Return x as [outer, T, S] whose rows are contiguous; a copy only where the strides need one."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _mask_arguments(mask: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int, int, int, int, int]:
    """Return (mask, size of the inner dim, strides of outer, inner, T, S): the leading dims folded into two.

    A mask that is repeated along dims that alternate with others more often is copied.
    """
    if mask is None:
        return None, 1, 0, 0, 0, 0
    mask = mask.expand(shape)
    folded: list[tuple[int, int]] = [(1, 0)]
    for size, stride in zip(shape[:-2], mask.stride()[:-2], strict=True):
        before, step = folded[-1]
        if size == 1:
            continue
        if before == 1 or step == size * stride:
            folded[-1] = (before * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 2:
        return _mask_arguments(mask.contiguous(), shape)
    (_, outer), (size, inner) = ((1, 0), *folded)[-2:]
    return mask, size, outer, inner, mask.stride(-2), mask.stride(-1)


def _settings(kernel: str, rows: int, keys: int) -> dict[str, Any]:
    chosen = launch.settings("softmax", kernel, keys)
    tile = chosen.pop("TILE")
    whole = triton.next_power_of_2(keys)
    count = max(tile // whole, 1)
    return {**chosen, "BLOCK": min(whole, tile), "ROWS": count, "WHOLE": whole <= tile, "WIDE": rows + count > 2**31}


@torch.library.custom_op("megalm::softmax_forward", mutates_args=())
def _forward_op(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    planes, (queries, keys) = _planes(x), x.shape[-2:]
    rows = x.numel() // keys
    mask, *mask_places = _mask_arguments(mask, x.shape)
    chosen = _settings("forward", rows, keys)
    _forward[(triton.cdiv(rows, chosen["ROWS"]),)](
        planes,
        mask,
        y,
        rows,
        queries,
        keys,
        *planes.stride()[:2],
        *mask_places,
        scale,
        CAUSAL=causal,
        **chosen,
    )
    return y


@_forward_op.register_fake
def _(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("megalm::softmax_backward", mutates_args=())
def _backward_op(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    dx = torch.empty_like(y, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return dx
    planes, (queries, keys) = _planes(dy), y.shape[-2:]
    rows = y.numel() // keys
    chosen = _settings("backward", rows, keys)
    _backward[(triton.cdiv(rows, chosen["ROWS"]),)](
        planes, y.contiguous(), dx, rows, queries, keys, *planes.stride()[:2], scale, CAUSAL=causal, **chosen
    )
    return dx


@_backward_op.register_fake
def _(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _differentiate(ctx, dy):
    (y,) = ctx.saved_tensors
    return torch.ops.megalm.softmax_backward(dy, y, ctx.scale, ctx.causal), None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup)


def scaled_masked_softmax(x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return softmax(scale * x) over the last dim of x [..., T, S], in its dtype.

    `mask` (bool, True where visible) is broadcast to the shape of x without a copy: [B, 1, 1, S] or [B, 1, T, S] for
    x [B, H, T, S]. Under `causal` position t sees s <= t + S - T. What is hidden is 0, and so are rows of which nothing
    is visible. x gets a gradient, the mask none. Raises ValueError for shapes and dtypes that do not fit.
    """
    if x.dim() < 2:
        raise ValueError(f"scaled_masked_softmax of x {tuple(x.shape)}; give [..., T, S]")
    if mask is not None:
        fits = mask.dim() <= x.dim() and all(
            m in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)
        )
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"scaled_masked_softmax of x {tuple(x.shape)} with mask {tuple(mask.shape)} {mask.dtype}; "
                "give a bool mask that broadcasts to x"
            )
    if not launch.fused(x, mask):
        return reference.scaled_masked_softmax(x, scale=scale, mask=mask, causal=causal)
    y: Tensor = torch.ops.megalm.softmax_forward(x, mask, scale, causal)
    return y
