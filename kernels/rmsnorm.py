"""RMSNorm: y = s / sqrt(mean(s^2) + eps) * weight over the last dim, with s = x or a residual's sum.

The formulas, forward and backward, stand in `norm`, which has the kernels. Source: Zhang and Sennrich 2019.
"""

from typing import Any

from torch import Tensor

from megalm.kernels import launch, norm, reference


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    row_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    dropout_origin: tuple[int, int, int] | None = None,
) -> Any:
    """Return the RMSNorm of x [..., D] in its dtype; with a residual (norm of sum, sum).

    sum = residual + dropout(x + row_bias), computed in fp32 and rounded to the dtype of x; the norm is that of the
    rounded sum. weight and row_bias are [D] in any float dtype, residual is like x. All of them get gradients.
    `dropout` needs x [B, T, D] and `seed`, the Philox key (0 .. 2^64-1); kept elements are scaled by 1 / (1 - rate).
    `dropout_origin` (first sample, first token, tokens of a whole sample; (0, 0, T) by default) places x in the logical
    tensor whose mask it takes a part of. Raises ValueError for shapes, dtypes or a rate that do not fit.
    """
    norm.check("rms_norm", x, weight, None, residual, row_bias, dropout, seed)
    if not launch.fused(x, weight, residual, row_bias):
        return reference.rms_norm(
            x,
            weight,
            eps=eps,
            residual=residual,
            row_bias=row_bias,
            dropout=dropout,
            seed=seed,
            dropout_origin=dropout_origin,
        )
    return norm.norm(x, residual, row_bias, weight, None, eps, False, dropout, seed, dropout_origin)
