"""Dropout by counters, with the residual addition fused.

    y = residual + keep(n) * x / (1 - rate)        dx = keep(n) * dy / (1 - rate)        dresidual = dy

n is the element's row-major index in the whole logical tensor [samples, tokens, features], so that the mask does not
depend on the layout (`philox`). It is drawn again in the backward pass: nothing is stored but the inputs' shape.
Source: Srivastava et al. 2014; Salmon et al. 2011 for the counters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, philox, reference


@triton.jit(do_not_specialize=["key", "limit", "origin"])
def _dropout(
    x,
    residual,
    y,
    count,
    key: tl.int64,
    limit,
    scale,
    origin: tl.int64,
    sample_size,
    sample_gap,
    QUADS: tl.constexpr,
    WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of elements. An element of sample b has the global index origin + its own + b * sample_gap."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    if QUADS:  # features, hence origin and every sample's size, are multiples of 4
        counter = (first + 4 * tl.arange(0, BLOCK // 4))[None, :]
        if not WHOLE:
            counter += (counter // sample_size) * sample_gap
        kept = tl.reshape(philox.keep_quads(key, (origin + counter) >> 2, limit), (BLOCK,))
    else:
        place = index
        if not WHOLE:
            place += (index // sample_size) * sample_gap
        kept = philox.keep(key, origin + place, limit)
    inside = index < count
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(kept, value * scale, 0.0)
    if RESIDUAL:
        value += tl.load(residual + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, value, mask=inside)


def _launch(x: Tensor, residual: Tensor | None, rate: float, seed: int, origin: list[int]) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    first_sample, first_token, all_tokens = origin
    _, tokens, features = x.shape
    chosen = launch.settings("dropout", "dropout", x.numel())
    _dropout[(triton.cdiv(x.numel(), chosen["BLOCK"]),)](
        x,
        y if residual is None else residual.contiguous(),
        y,
        x.numel(),
        seed,
        philox.threshold(rate),
        1.0 / (1.0 - rate),
        (first_sample * all_tokens + first_token) * features,
        tokens * features,
        (all_tokens - tokens) * features,
        QUADS=features % 4 == 0,
        WHOLE=tokens == all_tokens or x.shape[0] == 1,
        RESIDUAL=residual is not None,
        **chosen,
    )
    return y


@torch.library.custom_op("megalm::dropout", mutates_args=())
def _dropout_op(x: Tensor, residual: Tensor | None, rate: float, seed: int, origin: list[int]) -> Tensor:
    return _launch(x, residual, rate, seed, origin)


@_dropout_op.register_fake
def _(x: Tensor, residual: Tensor | None, rate: float, seed: int, origin: list[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, residual, ctx.rate, ctx.seed, ctx.origin = inputs
    ctx.residual = residual is not None


def _backward(ctx, dy):
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.megalm.dropout(dy, None, ctx.rate, ctx.seed, ctx.origin)
    return dx, dy if ctx.residual else None, None, None, None


_dropout_op.register_autograd(_backward, setup_context=_setup)


def dropout(
    x_BTD: Tensor,
    *,
    dropout: float,
    seed: int,
    dropout_origin: tuple[int, int, int] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x with elements dropped at the rate `dropout`, the others scaled by 1 / (1 - rate), plus `residual`.

    x_BTD and residual [B, T, D] have one dtype, which the result has too. `seed` is the Philox key (0 .. 2^64-1).
    `dropout_origin` (first sample, first token, tokens of a whole sample; (0, 0, T) by default) places x in the logical
    tensor whose mask it takes a part of. Raises ValueError for a rate outside [0, 1) or other shapes.
    """
    if x_BTD.dim() != 3 or (residual is not None and residual.shape != x_BTD.shape):
        shapes = tuple(x_BTD.shape), None if residual is None else tuple(residual.shape)
        raise ValueError(f"dropout of shape {shapes[0]} with residual {shapes[1]}; give [B, T, D], both the same")
    philox.threshold(dropout)
    origin = (0, 0, x_BTD.shape[1]) if dropout_origin is None else dropout_origin
    if not launch.fused(x_BTD, residual):
        return reference.dropout(x_BTD, dropout=dropout, seed=seed, dropout_origin=origin, residual=residual)
    return torch.ops.megalm.dropout(x_BTD, residual, dropout, launch.signed_key(seed), list(origin))
