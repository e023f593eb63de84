"""Activations of the feed-forward layer, computed in fp32; the backward passes recompute them from the inputs.

    swiglu(g, u) = silu(g) u        silu(g) = g s            s = sigmoid(g)       silu'(g) = s (1 + g (1 - s))
    geglu(g, u)  = gelu(g) u        gelu(x) = x s            s = sigmoid(2 z(x))  gelu'(x) = s + x s (1 - s) 2 z'(x)
    bias_gelu(x, b) = gelu(x + b)   z(x) = sqrt(2/pi) (x + 0.044715 x^3), so that s is (1 + tanh z) / 2 without its
                                    cancellation;            z'(x) = sqrt(2/pi) (1 + 3 * 0.044715 x^2)

    dg = dy u act'(g)        du = dy act(g)        dx = dy gelu'(x + b)        db = sum of dx over all rows

The sum is taken in two stages, both in fp32 and in an order that is fixed for a device: every program sums the rows
it works on, then the programs' sums are added.
Sources: Hendrycks and Gimpel 2016 (gelu, its tanh form); Shazeer 2020 (the gated forms).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference

# Constants stand to the right of tensors: the interpreter of triton 3.7 takes constexpr * tensor for a constexpr.
_DOUBLE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gate(x, SILU: tl.constexpr):
    """Return the s of the module's text and 1 - s, neither as a difference, which would cancel where s is near 1."""
    y = x if SILU else x * (x * x * _CUBIC + 1.0) * _DOUBLE_ROOT
    power = tl.exp(-tl.abs(y))
    larger = 1.0 / (1.0 + power)
    smaller = power * larger
    return tl.where(y < 0.0, smaller, larger), tl.where(y < 0.0, larger, smaller)


@triton.jit
def _slope(x, s, rest, SILU: tl.constexpr):
    """Return the derivative of x s at x; `rest` is 1 - s."""
    inner = 1.0
    if not SILU:
        square = tl.minimum(x * x, 1e4)  # s * rest is 0 long before; 0 times a square that overflows would be NaN
        inner = (square * (3.0 * _CUBIC) + 1.0) * _DOUBLE_ROOT
    return s + x * (s * rest) * inner


@triton.jit(do_not_specialize=["rows"])
def _gated_forward(
    gate, up, y, rows, F, gate_row, up_row, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    column_blocks = tl.cdiv(F, BLOCK_F)
    f = (tl.program_id(0) % column_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    n = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inside = (n < rows) & (f < F)
    g = tl.load(gate + n * gate_row + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + n * up_row + f, mask=inside, other=0.0).to(tl.float32)
    s, _ = _gate(g, SILU)
    tl.store(y + n * F + f, g * s * u, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gated_backward(
    dy,
    gate,
    up,
    dgate,
    dup,
    rows,
    F,
    dy_row,
    gate_row,
    up_row,
    out_row,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    column_blocks = tl.cdiv(F, BLOCK_F)
    f = (tl.program_id(0) % column_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    n = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inside = (n < rows) & (f < F)
    d = tl.load(dy + n * dy_row + f, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + n * gate_row + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + n * up_row + f, mask=inside, other=0.0).to(tl.float32)
    s, rest = _gate(g, SILU)
    tl.store(dgate + n * out_row + f, d * u * _slope(g, s, rest, SILU), mask=inside)
    tl.store(dup + n * out_row + f, d * g * s, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gelu_forward(x, bias, y, rows, F, x_row, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    column_blocks = tl.cdiv(F, BLOCK_F)
    f = (tl.program_id(0) % column_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    n = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inside = (n < rows) & (f < F)
    value = tl.load(x + n * x_row + f, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)
    s, _ = _gate(value, False)
    tl.store(y + n * F + f, value * s, mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def _gelu_backward(
    dy,
    x,
    bias,
    dx,
    sums,
    rows,
    F,
    programs,
    dy_row,
    x_row,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Program p of a column block works on its row blocks p, p + programs, ...; their column sums go to sums[p]."""
    column_blocks = tl.cdiv(F, BLOCK_F)
    p = tl.program_id(0) // column_blocks
    f = (tl.program_id(0) % column_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    b = tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32) if BIAS else 0.0
    for block in range(p, tl.cdiv(rows, BLOCK_N), programs):
        n = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        inside = (n < rows) & (f < F)
        d = tl.load(dy + n * dy_row + f, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + n * x_row + f, mask=inside, other=0.0).to(tl.float32) + b
        s, rest = _gate(value, False)
        d *= _slope(value, s, rest, False)
        tl.store(dx + n * F + f, d, mask=inside)
        if BIAS:
            total += d
    if BIAS:
        total_F = tl.sum(total, axis=0)[None, :]
        tl.store(sums + p.to(tl.int64) * F + f, total_F, mask=f < F)


def _rows(x: Tensor) -> Tensor:
    """Return x as [N, F] with features side by side: a view of x wherever one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _tiles(kernel: str, features: int) -> dict[str, int]:
    """Return a kernel's launch settings with its tile of about BLOCK elements cut to the width of the rows."""
    chosen = launch.settings("activations", kernel, features)
    block = chosen.pop("BLOCK")
    chosen["BLOCK_F"] = min(block, triton.next_power_of_2(features))
    chosen["BLOCK_N"] = block // chosen["BLOCK_F"]
    return chosen


def _count(chosen: dict[str, int], rows: int, features: int) -> int:
    return triton.cdiv(rows, chosen["BLOCK_N"]) * triton.cdiv(features, chosen["BLOCK_F"])


def _launch_gated(gate: Tensor, up: Tensor, silu: bool) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    gate, up = _rows(gate), _rows(up)
    rows, features = gate.shape
    chosen = _tiles("gated_forward", features)
    _gated_forward[(_count(chosen, rows, features),)](
        gate, up, y, rows, features, gate.stride(0), up.stride(0), SILU=silu, **chosen
    )
    return y


def _launch_gated_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, silu: bool) -> None:
    """Write both gradients; dgate and dup are [N, F] of one row stride, features side by side."""
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    rows, features = gate.shape
    chosen = _tiles("gated_backward", features)
    strides = dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0)
    _gated_backward[(_count(chosen, rows, features),)](
        dy, gate, up, dgate, dup, rows, features, *strides, SILU=silu, **chosen
    )


@torch.library.custom_op("megalm::gated_forward", mutates_args=())
def _gated_forward_op(gate: Tensor, up: Tensor, silu: bool) -> Tensor:
    return _launch_gated(gate, up, silu)


@torch.library.custom_op("megalm::gated_backward", mutates_args=())
def _gated_backward_op(dy: Tensor, gate: Tensor, up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    if gate.numel() > 0:
        _launch_gated_backward(dy, gate, up, _rows(dgate), _rows(dup), silu)
    return dgate, dup


@torch.library.custom_op("megalm::gated_packed_forward", mutates_args=())
def _packed_forward_op(x: Tensor, silu: bool) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _launch_gated(gate, up, silu)


@torch.library.custom_op("megalm::gated_packed_backward", mutates_args=())
def _packed_backward_op(dy: Tensor, x: Tensor, silu: bool) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        (gate, up), (dgate, dup) = x.chunk(2, dim=-1), _rows(dx).chunk(2, dim=-1)
        _launch_gated_backward(dy, gate, up, dgate, dup, silu)
    return dx


@_gated_forward_op.register_fake
def _(gate: Tensor, up: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_gated_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    empty = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


@_packed_forward_op.register_fake
def _(x: Tensor, silu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_packed_backward_op.register_fake
def _(dy: Tensor, x: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_gated(ctx, inputs, output):
    *saved, ctx.silu = inputs
    ctx.save_for_backward(*saved)


def _differentiate_gated(ctx, dy):
    gate, up = ctx.saved_tensors
    return *torch.ops.megalm.gated_backward(dy, gate, up, ctx.silu), None


def _differentiate_packed(ctx, dy):
    (x,) = ctx.saved_tensors
    return torch.ops.megalm.gated_packed_backward(dy, x, ctx.silu), None


_gated_forward_op.register_autograd(_differentiate_gated, setup_context=_save_gated)
_packed_forward_op.register_autograd(_differentiate_packed, setup_context=_save_gated)


@torch.library.custom_op("megalm::bias_gelu_forward", mutates_args=())
def _gelu_forward_op(x: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x = _rows(x)
    rows, features = x.shape
    chosen = _tiles("gelu_forward", features)
    _gelu_forward[(_count(chosen, rows, features),)](
        x,
        y if bias is None else bias.contiguous(),
        y,
        rows,
        features,
        x.stride(0),
        BIAS=bias is not None,
        **chosen,
    )
    return y


@torch.library.custom_op("megalm::bias_gelu_backward", mutates_args=())
def _gelu_backward_op(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the bias; without a bias the second is empty."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, x.new_empty(0) if bias is None else bias.new_zeros(bias.shape)
    dy, x = _rows(dy), _rows(x)
    rows, features = x.shape
    chosen = _tiles("gelu_backward", features)
    columns, programs = triton.cdiv(features, chosen["BLOCK_F"]), triton.cdiv(rows, chosen["BLOCK_N"])
    resident = chosen.pop("PER_PROCESSOR") * launch.processors(x.device)
    if bias is not None:
        programs = min(programs, max(1, resident // columns))  # all at once: a second wave would be a short one
    sums_PF = torch.empty(programs if bias is not None else 0, features, dtype=torch.float32, device=x.device)
    _gelu_backward[(programs * columns,)](
        dy,
        x,
        dx if bias is None else bias.contiguous(),
        dx,
        sums_PF,
        rows,
        features,
        programs,
        dy.stride(0),
        x.stride(0),
        BIAS=bias is not None,
        **chosen,
    )
    return dx, x.new_empty(0) if bias is None else sums_PF.sum(0).to(bias.dtype)


@_gelu_forward_op.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gelu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.megalm.bias_gelu_backward(dy, x, bias)
    return dx, None if bias is None else dbias


_gelu_forward_op.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, contiguous; both [..., F] of one shape and dtype, halves of one tensor are not copied.

    Raises ValueError for other shapes or dtypes. Source: Shazeer 2020.
    """
    _check_pair("swiglu", gate, up)
    if not launch.fused(gate, up):
        return reference.swiglu(gate, up)
    return torch.ops.megalm.gated_forward(gate, up, True)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up with the tanh form of gelu, contiguous; arguments and errors are those of `swiglu`."""
    _check_pair("geglu", gate, up)
    if not launch.fused(gate, up):
        return reference.geglu(gate, up)
    return torch.ops.megalm.gated_forward(gate, up, False)


def swiglu_packed(x: Tensor) -> Tensor:
    """Return silu(gate) * up for x [..., 2F] = (gate, up) side by side: [..., F].

    Its backward pass writes the one gradient [..., 2F]; that of `swiglu` on two halves copies two gradients into it.
    Raises ValueError for an odd last dim.
    """
    _check_packed("swiglu_packed", x)
    if not launch.fused(x):
        return reference.swiglu_packed(x)
    return torch.ops.megalm.gated_packed_forward(x, True)


def geglu_packed(x: Tensor) -> Tensor:
    """Return gelu(gate) * up for x [..., 2F] = (gate, up): as `swiglu_packed`."""
    _check_packed("geglu_packed", x)
    if not launch.fused(x):
        return reference.geglu_packed(x)
    return torch.ops.megalm.gated_packed_forward(x, False)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return gelu(x + bias), the tanh form, contiguous in the dtype of x; without a bias gelu(x).

    x [..., F] and bias [F] may differ in dtype; the sum is not rounded in between. Raises ValueError for other shapes.
    Source: Hendrycks and Gimpel 2016.
    """
    if x.dim() == 0 or (bias is not None and bias.shape != x.shape[-1:]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"bias_gelu of shape {tuple(x.shape)} with bias {shape}; give [..., F] and [F] or None")
    if not launch.fused(x, bias):
        return reference.bias_gelu(x, bias)
    return torch.ops.megalm.bias_gelu_forward(x, bias)


def _check_pair(name: str, gate: Tensor, up: Tensor) -> None:
    if gate.dim() == 0 or gate.shape != up.shape or gate.dtype is not up.dtype:
        given = f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"{name} of {given}; give both as [..., F] of one dtype")


def _check_packed(name: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{name} of shape {tuple(x.shape)}; the last dim holds gate and up, so it is even")
