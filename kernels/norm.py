"""LayerNorm and RMSNorm over the last dim with the residual addition before them: what `layernorm` and `rmsnorm` share.

    s = round(residual + keep(n) (x + row_bias) / (1 - rate)), or s = x without a residual
    m = mean(s) for LayerNorm, 0 for RMSNorm;   r = 1 / sqrt(mean((s - m)^2) + eps);   h = (s - m) r;   y = h w + b

    g = w dy;   ds = r (g - h mean(g h) - mean(g)) + (the gradient of the output s); mean(g) in LayerNorm alone
    dresidual = ds;   dx = keep(n) ds / (1 - rate);   drow_bias = sum of dx;   dw = sum of dy h;   db = sum of dy

s is rounded to the dtype of x before its statistics are taken: y is the norm of the tensor s that the caller gets. All
else is fp32; m and r are kept for the backward pass, keep(n) is drawn again there (`philox`). The last three sums go
over all rows: each program adds up its share of the rows, a second kernel adds the programs' sums, without atomics.

Rows of up to TILE features (of the launch table) are read once, several short ones a program. Longer ones go through in
blocks: forward twice over the row, the second time from the cache; backward first their two means, then columns by
columns, since the sums over rows of a whole one would not fit into registers.
Sources: Ba et al. 2016; Zhang and Sennrich 2019; Welford 1962 and Chan et al. 1979 for variances by parts.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from megalm.kernels import launch, norm_kernels, philox


def _rows(x: Tensor) -> Tensor:
    """Return x as [rows, features] whose rows are contiguous; a copy only where the strides need one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _tiles(kernel: str, dtype: torch.dtype, features: int) -> dict[str, Any]:
    """Return the launch settings of a kernel; BLOCK is a whole row where TILE holds one, ROWS how many."""
    if dtype == torch.float32:
        kernel += "_fp32"
    chosen = launch.settings("norm", kernel, features)
    tile = chosen.pop("TILE")
    whole = max(triton.next_power_of_2(features), 4)
    return {**chosen, "BLOCK": min(whole, tile), "ROWS": max(tile // whole, 1)}


def _draw(shape: torch.Size, rate: float, seed: int, origin: list[int]) -> dict[str, Any]:
    """Return the kernels' arguments of the mask; without dropout none is read."""
    if rate == 0.0:
        values = {"key": 0, "limit": 0, "scale": 1.0, "origin": 0, "tokens": 1, "gap": 0}
    else:
        first_sample, first_token, all_tokens = origin
        values = {
            "key": seed,
            "limit": philox.threshold(rate),
            "scale": 1.0 / (1.0 - rate),
            "origin": first_sample * all_tokens + first_token,
            "tokens": shape[1],
            "gap": all_tokens - shape[1],
        }
    return {**values, "DROPOUT": rate > 0.0, "GAP": values["gap"] != 0, "QUADS": shape[-1] % 4 == 0}


@torch.library.custom_op("megalm::norm_forward", mutates_args=())
def _forward_op(
    x: Tensor,
    residual: Tensor | None,
    row_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    rate: float,
    seed: int,
    origin: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, m, r): s is empty without a residual, m without centring."""
    outputs = y, total, mean, rstd = _new_outputs(x, residual is not None, centred)
    if x.numel() == 0:
        return outputs
    rows, added = _rows(x), None if residual is None else _rows(residual)
    count, features = rows.shape
    chosen = _tiles("forward", x.dtype, features)
    norm_kernels.forward[(triton.cdiv(count, chosen["ROWS"]),)](
        rows,
        added,
        None if row_bias is None else row_bias.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        total,
        mean,
        rstd,
        count,
        features,
        rows.stride(0),
        0 if added is None else added.stride(0),
        eps,
        **_draw(x.shape, rate, seed, origin),
        CENTRED=centred,
        WHOLE=chosen["BLOCK"] >= features,
        **chosen,
    )
    return outputs


def _new_outputs(x: Tensor, with_sum: bool, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = x.numel() // max(x.shape[-1], 1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if with_sum else x.new_empty(0)
    mean, rstd = (x.new_empty(size, dtype=torch.float32) for size in (count if centred else 0, count))
    return y, total, mean, rstd


@_forward_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    row_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    rate: float,
    seed: int,
    origin: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(x, residual is not None, centred)


@torch.library.custom_op("megalm::norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    d_total: Tensor | None,
    source: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    row_bias_dtype: torch.dtype | None,
    rate: float,
    seed: int,
    origin: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dw, db, drow_bias): dresidual is empty where it is dx, those without a dtype are."""
    dtypes = weight_dtype, bias_dtype, row_bias_dtype
    outputs = dx, d_residual, *sums = _new_gradients(source, rate, *dtypes)
    if source.numel() == 0:
        for total in sums:
            total.zero_()
        return outputs
    count, features = dx.numel() // dx.shape[-1], dx.shape[-1]
    kernel = "backward_dropout" if rate > 0.0 else "backward"  # drawing masks takes registers
    chosen = _tiles(kernel, source.dtype, features)
    means, blocks = None, 1
    if "COLUMNS" in chosen:
        columns = chosen.pop("COLUMNS")
        chosen.update(ROWS=chosen["BLOCK"] // columns, BLOCK=columns)
        blocks = triton.cdiv(features, columns)
    upstream, rows = _rows(dy), _rows(source)
    d_total = None if d_total is None else _rows(d_total)
    wanted = launch.processors(dx.device) * chosen.pop("PER_PROCESSOR")
    shares = min(triton.cdiv(wanted, blocks), triton.cdiv(count, chosen["ROWS"]))
    given = [total for total, dtype in zip(sums, dtypes, strict=True) if dtype is not None]
    partial = dx.new_empty((len(given), shares, features), dtype=torch.float32)
    weight = weight.contiguous()
    if blocks > 1:
        means = rstd.new_empty((2, count))
        norm_kernels.row_means[(count,)](
            upstream,
            rows,
            weight,
            mean,
            rstd,
            means,
            count,
            features,
            upstream.stride(0),
            rows.stride(0),
            CENTRED=mean.numel() > 0,
            **launch.settings("norm", "row_means", features),
        )
    norm_kernels.backward[(shares, blocks)](
        upstream,
        d_total,
        rows,
        weight,
        mean,
        rstd,
        means,
        dx,
        d_residual,
        partial,
        count,
        features,
        upstream.stride(0),
        0 if d_total is None else d_total.stride(0),
        rows.stride(0),
        **_draw(source.shape, rate, seed, origin),
        CENTRED=mean.numel() > 0,
        WEIGHT=weight_dtype is not None,
        BIAS=bias_dtype is not None,
        ROW_BIAS=row_bias_dtype is not None,
        **chosen,
    )
    if given:
        settings = launch.settings("norm", "add_partial", features)
        first, second, third = (*given, None, None)[:3]
        norm_kernels.add_partial[(triton.cdiv(features, settings["BLOCK"]), len(given))](
            partial, first, second, third, shares, features, **settings
        )
    return outputs


def _new_gradients(
    source: Tensor,
    rate: float,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    row_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(source, memory_format=torch.contiguous_format)
    d_residual = torch.empty_like(dx) if rate > 0.0 else source.new_empty(0)
    d_weight, d_bias, d_row_bias = (
        source.new_empty(0) if dtype is None else source.new_empty(source.shape[-1], dtype=dtype)
        for dtype in (weight_dtype, bias_dtype, row_bias_dtype)
    )
    return dx, d_residual, d_weight, d_bias, d_row_bias


@_backward_op.register_fake
def _(
    dy: Tensor,
    d_total: Tensor | None,
    source: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    row_bias_dtype: torch.dtype | None,
    rate: float,
    seed: int,
    origin: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(source, rate, weight_dtype, bias_dtype, row_bias_dtype)


def _setup(ctx, inputs, output):
    x, residual, row_bias, weight, bias, _, _, ctx.rate, ctx.seed, ctx.origin = inputs
    _, total, mean, rstd = output
    ctx.with_residual = residual is not None
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, row_bias)]
    ctx.save_for_backward(total if ctx.with_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, d_total, *_):
    source, weight, mean, rstd = ctx.saved_tensors
    need_x, need_residual, need_row_bias, need_weight, need_bias, *_ = ctx.needs_input_grad
    needed = (need_weight, need_bias, need_row_bias)
    dx, d_residual, d_weight, d_bias, d_row_bias = torch.ops.megalm.norm_backward(
        torch.zeros_like(source) if dy is None else dy,
        d_total if ctx.with_residual else None,
        source,
        weight,
        mean,
        rstd,
        *(dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True)),
        ctx.rate,
        ctx.seed,
        ctx.origin,
    )
    return (
        dx if need_x else None,
        (d_residual if ctx.rate > 0.0 else dx) if need_residual else None,
        d_row_bias if need_row_bias else None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
        *(None for _ in range(5)),
    )


_forward_op.register_autograd(_differentiate, setup_context=_setup)


def check(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_bias: Tensor | None,
    rate: float,
    seed: int | None,
) -> None:
    """Raise ValueError in one line where the arguments of a norm do not fit together."""
    features = x.shape[-1:]
    for what, given in (("weight", weight), ("bias", bias), ("row_bias", row_bias)):
        if given is not None and given.shape != features:
            raise ValueError(f"{name}: {what} of shape {tuple(given.shape)} for x {tuple(x.shape)}; give [D]")
    if residual is None:
        if row_bias is not None or rate != 0.0:
            raise ValueError(f"{name}: row_bias or dropout={rate} without a residual; they act on what is added to one")
        return
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"{name}: residual {tuple(residual.shape)} {residual.dtype} is unlike x {tuple(x.shape)} {x.dtype}; "
            "shape and dtype must be the same"
        )
    philox.threshold(rate)
    if rate > 0.0 and (x.dim() != 3 or seed is None):
        raise ValueError(f"{name}: dropout={rate} for x {tuple(x.shape)} and seed={seed}; give x [B, T, D] and a seed")


def norm(
    x: Tensor,
    residual: Tensor | None,
    row_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    rate: float,
    seed: int | None,
    dropout_origin: tuple[int, int, int] | None,
) -> Any:
    """Return y, or (y, s) with a residual, from the kernels; the arguments are checked."""
    origin = [0, 0, x.shape[-2] if x.dim() > 1 else 1] if dropout_origin is None else list(dropout_origin)
    key = 0 if seed is None else launch.signed_key(seed)
    y, total, *_ = torch.ops.megalm.norm_forward(x, residual, row_bias, weight, bias, eps, centred, rate, key, origin)
    return y if residual is None else (y, total)
