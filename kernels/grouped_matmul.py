"""Matrix products of a mixture of experts: rows that are sorted by expert, each times the matrix of its expert.

    y_n = W_e x_n        dx_n = W_e^T dy_n        dW_e = sum of dy_n x_n^T over the rows n of expert e

How many rows each expert has is known on the device alone, and nothing here waits for it: a program finds out what its
tile is. With the prefix sums start_e of the counts, expert e gets the tiles from floor(start_e / BLOCK_M) + e on, which
are as many as its rows need or one more. The expert of a tile is thus the number of those that begin later than the
first and not later than the tile, and there are floor(N / BLOCK_M) + E + 1 tiles, whatever the counts; the last expert
is none: its rows get zeros. No atomics: sums are taken in fp32, in one order, and rounded once.

All launch settings but the interpreter's are reasoned, not measured yet: the usual tiles of a dense product.
Source: Gale et al. 2022 (MegaBlocks) for products of groups without padding; Tillet et al. 2019 (Triton) and its matrix
product tutorial for the order of tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference

MOST_EXPERTS = 4096  # every program reads the prefix sums of all at once
_LONGEST_ROW_STRIDE = 2**23  # a tile of at most 256 rows is addressed in 32 bits from its 64-bit first place


@triton.jit
def _ordered(program, rows, columns, GROUP: tl.constexpr):
    """Return the (row, column) of a program's tile: GROUP rows of tiles at a time, so that neighbours share inputs."""
    first = program // (GROUP * columns) * GROUP
    within = program % (GROUP * columns)
    count = tl.minimum(rows - first, GROUP)
    return first + within % count, within // count


@triton.jit
def _rows_of_tile(ends, tile, N, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (expert, first row, how many rows are left of the expert's); expert E has the rows that are nobody's."""
    lane = tl.arange(0, EXPERTS)
    later = tl.load(ends + lane, mask=lane < E, other=0) // BLOCK_M + lane + 1  # where the next expert's tiles begin
    expert = tl.sum(((lane < E) & (later <= tile)).to(tl.int32), axis=0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.minimum(tl.load(ends + expert, mask=expert < E, other=N), N)
    row = start + (tile - (start // BLOCK_M + expert)) * BLOCK_M
    return expert, row, stop - row


@triton.jit(do_not_specialize=["N"])
def _products(
    x,
    weight,
    ends,
    y,
    N,
    D,
    F,
    E,
    x_n,
    w_e,
    w_f,
    w_d,
    EXPERTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of y: rows of one expert, BLOCK_N columns. EVEN: BLOCK_K divides D."""
    tile, column = _ordered(tl.program_id(0), N // BLOCK_M + E + 1, tl.cdiv(F, BLOCK_N), GROUP)
    expert, first, rows = _rows_of_tile(ends, tile, N, E, EXPERTS, BLOCK_M)
    if rows <= 0:
        return
    row = tl.arange(0, BLOCK_M)[:, None]
    f = tl.arange(0, BLOCK_N)[None, :]
    columns = F - column * BLOCK_N
    x += first.to(tl.int64) * x_n
    weight += expert.to(tl.int64) * w_e + (column * BLOCK_N).to(tl.int64) * w_f
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in tl.range(0, tl.where(expert < E, D, 0), BLOCK_K):
        k = tl.arange(0, BLOCK_K)
        x_mask = row < rows
        w_mask = f < columns
        if not EVEN:
            x_mask = x_mask & (k < D - d)[None, :]
            w_mask = w_mask & (k < D - d)[:, None]
        x_tile = tl.load(x + d + row * x_n + k[None, :], mask=x_mask, other=0.0)
        w_tile = tl.load(weight + tl.cast(d, tl.int64) * w_d + k[:, None] * w_d + f * w_f, mask=w_mask, other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    y += first.to(tl.int64) * F + column * BLOCK_N
    tl.store(y + row * F + f, total.to(y.dtype.element_ty), mask=(row < rows) & (f < columns))


@triton.jit(do_not_specialize=["N"])
def _weight_gradients(
    x,
    dy,
    ends,
    dweight,
    N,
    D,
    F,
    x_n,
    dy_n,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of an expert's gradient, BLOCK_M of F by BLOCK_N of D: a sum over the expert's rows, which may be 0."""
    tiles = tl.cdiv(F, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    expert = tl.program_id(0) // tiles
    f_tile, d_tile = _ordered(tl.program_id(0) % tiles, tl.cdiv(F, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    f = f_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = d_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_K)[:, None]
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.minimum(tl.load(ends + expert), N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in tl.range(start, stop, BLOCK_K):
        place = tl.cast(n, tl.int64)
        mine = row < stop - n
        dy_tile = tl.load(dy + place * dy_n + row * dy_n + f[None, :], mask=mine & (f < F)[None, :], other=0.0)
        x_tile = tl.load(x + place * x_n + row * x_n + d[None, :], mask=mine & (d < D)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy_tile), x_tile, total, input_precision=PRECISION)
    dweight += expert.to(tl.int64) * F * D + (f_tile * BLOCK_M).to(tl.int64) * D + d_tile * BLOCK_N
    places = tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, BLOCK_N)[None, :]
    tl.store(dweight + places, total.to(dweight.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


def _settings(kernel: str, dtype: torch.dtype, rows: int, *widths: int) -> dict[str, Any]:
    """Return the table's row for `rows` rows of an expert in the mean. Two things have rows of their own.

    They are products in fp32, which run on other units, and widths that let no 16 bytes be loaded at once: then tiles
    pass through registers.
    """
    odd = any(width % 16 for width in widths)
    suffix = "_fp32" if dtype == torch.float32 else "_odd" if odd else ""
    return launch.settings("grouped_matmul", kernel + suffix, rows)


def _strided(x: Tensor) -> Tensor:
    """Return rows that kernels can read in place: numbers side by side, rows close enough."""
    return x if x.stride(1) == 1 and x.stride(0) < _LONGEST_ROW_STRIDE else x.contiguous()


def _multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each row times the transposed matrix of its expert, [E, F, D], or zeros."""
    (N, D), (E, F, _) = x.shape, weight.shape
    y = x.new_empty((N, F))
    if y.numel() == 0 or weight.numel() == 0:
        return y.zero_()
    x = _strided(x)
    strides = weight.stride()[1:]
    if min(strides) != 1 or max(strides) >= _LONGEST_ROW_STRIDE:
        weight = weight.contiguous()
    chosen = _settings("products", x.dtype, N // E, D, F)
    tiles = N // chosen["BLOCK_M"] + E + 1
    _products[(tiles * triton.cdiv(F, chosen["BLOCK_N"]),)](
        x,
        weight,
        ends,
        y,
        N,
        D,
        F,
        E,
        x.stride(0),
        *weight.stride(),
        EXPERTS=triton.next_power_of_2(E),
        EVEN=D % chosen["BLOCK_K"] == 0,
        PRECISION="ieee",
        **chosen,
    )
    return y


def _sum_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return dy^T x over the rows of each expert, [E, F, D]."""
    (N, F), D, E = dy.shape, x.shape[1], ends.shape[0]
    dweight = x.new_empty((E, F, D))
    if N == 0 or dweight.numel() == 0:
        return dweight.zero_()
    x, dy = _strided(x), _strided(dy)
    chosen = _settings("weight_gradients", x.dtype, N // E, D, F)
    tiles = triton.cdiv(F, chosen["BLOCK_M"]) * triton.cdiv(D, chosen["BLOCK_N"])
    _weight_gradients[(E * tiles,)](
        x, dy, ends, dweight, N, D, F, x.stride(0), dy.stride(0), PRECISION="ieee", **chosen
    )
    return dweight


def _row_ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


@torch.library.custom_op("megalm::grouped_matmul", mutates_args=())
def _grouped_matmul_op(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _multiply(x, weight, _row_ends(counts))


@_grouped_matmul_op.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op("megalm::grouped_matmul_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), each contiguous; empty [0] where not needed."""
    ends = _row_ends(counts)
    dx = _multiply(dy, weight.transpose(1, 2), ends) if need_x else x.new_empty(0)
    dweight = _sum_products(dy, x, ends) if need_weight else weight.new_empty(0)
    return dx, dweight


@_backward_op.register_fake
def _(dy, x, weight, counts, need_x, need_weight) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    need_x, need_weight, _ = ctx.needs_input_grad
    dx, dweight = torch.ops.megalm.grouped_matmul_backward(dy, *ctx.saved_tensors, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None


_grouped_matmul_op.register_autograd(_backward, setup_context=_setup)


def _check(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    given = f"x {x.dtype} {tuple(x.shape)} and weight {weight.dtype} {tuple(weight.shape)}"
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or x.dtype != weight.dtype:
        raise ValueError(f"grouped_matmul of {given}; give x [N, D] and weight [E, F, D], both of one dtype")
    if weight.shape[0] > MOST_EXPERTS:
        raise ValueError(f"grouped_matmul of {given}: {weight.shape[0]} experts; at most {MOST_EXPERTS} are supported")
    if counts.shape != weight.shape[:1] or counts.dtype not in (torch.int32, torch.int64):
        shape = f"counts {counts.dtype} {tuple(counts.shape)}"
        raise ValueError(f"grouped_matmul with {shape}; give int32 or int64 [{weight.shape[0]}], one an expert")


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Return y_NF: the first counts[0] rows of x times weight[0]^T, the next counts[1] times weight[1]^T, and so on.

    Rows beyond the sum of the counts get zeros, as do their gradients and those of experts without rows. x and weight
    have one dtype, which the result has too: fp32, bf16 or fp16 on a GPU, where nothing waits for the counts (int32 or
    int64, on the same device); others take plain torch, which reads them. The values of the counts are not checked:
    none may be below 0, and their sum is at most N. Raises ValueError for wrong shapes or dtypes.
    """
    _check(x_ND, weight_EFD, counts_E)
    if not launch.fused(x_ND, weight_EFD, counts_E):
        return reference.grouped_matmul(x_ND, weight_EFD, counts_E)
    return torch.ops.megalm.grouped_matmul(x_ND, weight_EFD, counts_E)
