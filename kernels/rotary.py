"""Rotary positions: pairs of features of every head turn by angles that depend on the token.

Half-split form, with R the tables' width, j < R/2, x1 = x[..., j] and x2 = x[..., j + R/2]; features from R on stay:

    y1 = x1 cos[j] - x2 sin[j]                       y2 = x2 cos[j + R/2] + x1 sin[j + R/2]
    dx1 = dy1 cos[j] + dy2 sin[j + R/2]              dx2 = dy2 cos[j + R/2] - dy1 sin[j]

The two halves of a table may differ, so the backward pass is the transpose of the forward pass, not its inverse.
Source: Su et al. 2021, equation 34; the half-split form is GPT-NeoX's (Black et al. 2022).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference


@triton.jit(do_not_specialize=["tokens", "heads"])
def _turn(
    x,
    cos,
    sin,
    y,
    tokens,
    heads,
    x_row,
    x_token,
    x_head,
    table_row,
    table_token,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_T tokens of one row, head by head for HEADS heads: what is read of the tables stays in registers."""
    program = tl.program_id(0)
    head_blocks = tl.cdiv(heads, HEADS)
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    tile = program // head_blocks
    head = (program % head_blocks) * HEADS
    row = (tile // token_blocks).to(tl.int64)
    t = ((tile % token_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    j = tl.arange(0, BLOCK_E)[None, :]
    k = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    inside = (t < tokens) & (j < HALF)
    beyond = (t < tokens) & (k < 2 * HALF + REST)

    table = row * table_row + t * table_token + j
    cos1 = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + table + HALF, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + table + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        sin1, sin2 = -sin2, -sin1

    source = x + row * x_row + t * x_token + head.to(tl.int64) * x_head
    target = y + ((row * tokens + t) * heads + head) * (2 * HALF + REST)
    for _ in range(head, tl.minimum(head + HEADS, heads)):
        x1 = tl.load(source + j, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + j + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + j, x1 * cos1 - x2 * sin1, mask=inside)
        tl.store(target + j + HALF, x2 * cos2 + x1 * sin2, mask=inside)
        if REST > 0:
            tl.store(target + k, tl.load(source + k, mask=beyond, other=0.0), mask=beyond)
        source += x_head
        target += 2 * HALF + REST


def _launch(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    rows, tokens, heads, features = x.shape
    half = cos.shape[-1] // 2
    rest = features - 2 * half
    block = triton.next_power_of_2(half)
    chosen = launch.settings("rotary", "turn", half)
    block_t = min(max(1, chosen.pop("PAIRS") // block), triton.next_power_of_2(tokens))
    _turn[(rows * triton.cdiv(tokens, block_t) * triton.cdiv(heads, chosen["HEADS"]),)](
        x,
        cos,
        sin,
        y,
        tokens,
        heads,
        *x.stride()[:3],
        cos.stride(0) if cos.dim() == 3 else 0,
        cos.stride(-2),
        HALF=half,
        REST=rest,
        BACKWARD=backward,
        BLOCK_T=block_t,
        BLOCK_E=block,
        BLOCK_REST=triton.next_power_of_2(max(rest, 1)),
        **chosen,
    )
    return y


@torch.library.custom_op("megalm::rotary_forward", mutates_args=())
def _forward_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch(x, cos, sin, backward=False)


@torch.library.custom_op("megalm::rotary_backward", mutates_args=())
def _backward_op(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch(dy, cos, sin, backward=True)


@_forward_op.register_fake
@_backward_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    cos, sin = ctx.saved_tensors
    dx = torch.ops.megalm.rotary_backward(dy, cos, sin) if ctx.needs_input_grad[0] else None
    return dx, None, None


_forward_op.register_autograd(_backward, setup_context=_setup)


def apply_rotary(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Return x with its pairs (j, j + R/2) turned by the angles whose cosine and sine are given.

    x_BTHE (any strides, no copy is made of a view of a fused projection) -> a new contiguous tensor of its shape and
    dtype. The tables are [T, R], or [B, T, R] where every row has its own positions; R is even and at most E, and the
    features from R on pass through. Computed in fp32, so the tables should be fp32; they get no gradient.
    Queries and keys that lie side by side in one projection turn in one call, as heads of one view of it.
    Raises ValueError for other shapes. Source: Su et al. 2021, the half-split form.
    """
    if x_BTHE.dim() != 4:
        raise ValueError(f"apply_rotary of x with shape {tuple(x_BTHE.shape)}; give [B, T, H, E]")
    rows, tokens, _, features = x_BTHE.shape
    shape, turned = tuple(cos_TE.shape), cos_TE.shape[-1] if cos_TE.dim() else 0
    if shape != tuple(sin_TE.shape) or shape[:-1] not in ((tokens,), (rows, tokens)):
        raise ValueError(
            f"apply_rotary of x with shape {tuple(x_BTHE.shape)} has cosines {shape} and sines {tuple(sin_TE.shape)}; "
            f"give both as [{tokens}, R] or [{rows}, {tokens}, R]"
        )
    if turned % 2 or not 2 <= turned <= features:
        raise ValueError(f"apply_rotary turns R={turned} of {features} features; R is even, 2 or more and at most E")
    if not launch.fused(x_BTHE, cos_TE, sin_TE):
        return reference.apply_rotary(x_BTHE, cos_TE, sin_TE)
    return torch.ops.megalm.rotary_forward(x_BTHE, cos_TE, sin_TE)
