"""Every operation in plain torch: what the model computes with, and the oracle of any fused kernel.

Shapes: B batch, T query positions, S key positions, H query heads, G key/value heads, E head size, D model,
F feed-forward, N rows. All functions are differentiable, keep the dtype of their input, and accept
float64, float32, bfloat16 and float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attention(
    q_BTHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    dropout_scale_BHTS: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v as BTHE; query head h reads key/value head h // (H / G).

    `scale` defaults to 1 / sqrt(E). Under `causal` position t sees positions 0..t.
    `dropout_scale_BHTS` multiplies the probabilities: 0 where dropped, 1 / (1 - rate) where kept.
    """
    q_BHTE, k_BGSE, v_BGSE = (x.transpose(1, 2) for x in (q_BTHE, k_BSGE, v_BSGE))
    grouped = q_BHTE.shape[1] != k_BGSE.shape[1]
    if dropout_scale_BHTS is None:
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BGSE, v_BGSE, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return out_BHTE.transpose(1, 2)
    if grouped:
        repeats = q_BHTE.shape[1] // k_BGSE.shape[1]
        k_BGSE, v_BGSE = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSE, v_BGSE))
    scale = q_BHTE.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTS = (q_BHTE * scale) @ k_BGSE.transpose(-2, -1)
    if causal:
        rows, columns = scores_BHTS.shape[-2:]
        future_TS = torch.ones(rows, columns, dtype=torch.bool, device=scores_BHTS.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(future_TS, float("-inf"))
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    probabilities_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=wide) * dropout_scale_BHTS
    return (probabilities_BHTS.to(v_BGSE.dtype) @ v_BGSE).transpose(1, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last dim (Ba et al. 2016)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def apply_rotary(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (j, j + E/2) of every head by the angles whose cosine and sine are given.

    x' = x * cos + (-x2, x1) * sin with x = (x1, x2) split in halves (Su et al. 2021, the half-split form). Computed in
    the tables' dtype, which should be fp32 or wider.
    """
    half = x_BTHE.shape[-1] // 2
    turned = torch.cat((-x_BTHE[..., half:], x_BTHE[..., :half]), dim=-1)
    return (x_BTHE * cos_TE[:, None, :] + turned * sin_TE[:, None, :]).to(x_BTHE.dtype)


def gelu(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form of GPT-2 (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020)."""
    return F.silu(gate) * up
