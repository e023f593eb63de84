"""Every operation in plain torch: what the model computes with, and the oracle of any fused kernel.

Shapes: B batch, T query positions, S key positions, H query heads, G key/value heads, E head size, D model,
F feed-forward, N rows. All functions are differentiable, keep the dtype of their input, and accept
float64, float32, bfloat16 and float16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_RUN = 1024  # elements whose squares are summed in fp32


def flash_attention(
    q_BTHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    dropout_origin: tuple[int, int, int] | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    within: tuple[int, int, int, int] | None = None,
    return_lse: bool = False,
    dropout_scale_BHTS: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    visible_BTS: Tensor | None = None,
) -> Any:
    """Return softmax(q k^T * scale) v as BTHE; query head h reads key/value head h // (H / G).

    All arguments are those of `attention.flash_attention`, which says what they do; with `return_lse` the result is
    (out, lse), lse [B, H, T] in fp32 or wider. `scale` defaults to 1 / sqrt(E). Under `causal` position t of T sees the
    keys up to t + S - T. `dropout_scale_BHTS` multiplies the probabilities: 0 where dropped, 1 / (1 - rate) where kept;
    `dropout` and `seed` make it here. `bias_HTS` is added to the scores, of which `visible_BTS` (bool) hides some.
    """
    q_BHTE, k_BGSE, v_BGSE = (x.transpose(1, 2) for x in (q_BTHE, k_BSGE, v_BSGE))
    (samples, heads, queries, features), (groups, keys) = q_BHTE.shape, k_BGSE.shape[1:3]
    within = within or (0, 0, queries, keys)
    place = place_of_first_query(within)
    if dropout > 0.0:
        assert seed is not None and dropout_scale_BHTS is None, "dropout takes a seed, or its multipliers from outside"
        shape = (samples, heads, queries, keys)
        dropout_scale_BHTS = _attention_dropout_scale(seed, dropout, shape, dropout_origin, within, q_BTHE)
    if documents is not None:
        visible_BTS = (documents[0][:, None] == documents[1])[None]
    square = queries == keys and place == 0
    masked = any(x is not None for x in (window, cu_seqlens, key_lengths, visible_BTS)) or (causal and not square)
    changed = any(x is not None for x in (dropout_scale_BHTS, softcap, alibi_slopes, bias_HTS))
    if not (changed or masked or return_lse):
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BGSE, v_BGSE, is_causal=causal, scale=scale, enable_gqa=heads != groups
        )
        return out_BHTE.transpose(1, 2)
    if heads != groups:
        k_BGSE, v_BGSE = (x.repeat_interleave(heads // groups, dim=1) for x in (k_BGSE, v_BGSE))
    scale = features**-0.5 if scale is None else scale
    scores_BHTS = biased_scores((q_BHTE * scale) @ k_BGSE.transpose(-2, -1), softcap, alibi_slopes, bias_HTS, place)
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    blind = None
    if causal or masked:
        masks = (causal, window, cu_seqlens, key_lengths, visible_BTS, place)
        hidden = hidden_keys(queries, keys, q_BTHE.device, *masks)
        scores_BHTS = scores_BHTS.masked_fill(hidden, float("-inf"))
        if key_lengths is not None or not square:  # else every query sees itself
            blind = hidden.all(dim=-1, keepdim=True)
            scores_BHTS = scores_BHTS.masked_fill(blind, 0.0)  # -inf alone would make NaN, in the gradients too
    probabilities_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=wide)
    if blind is not None:
        probabilities_BHTS = probabilities_BHTS.masked_fill(blind, 0.0)
    if dropout_scale_BHTS is not None:
        probabilities_BHTS = probabilities_BHTS * dropout_scale_BHTS
    out_BTHE = (probabilities_BHTS.to(v_BGSE.dtype) @ v_BGSE).transpose(1, 2)
    if not return_lse:
        return out_BTHE
    lse_BHT = torch.logsumexp(scores_BHTS.to(wide), dim=-1)
    return out_BTHE, lse_BHT if blind is None else lse_BHT.masked_fill(blind.squeeze(-1), float("-inf"))


def flash_attention_gradients(
    dout_BTHE: Tensor,
    dlse_BHT: Tensor | None,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    q_BTHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    within: tuple[int, int, int, int] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    dropout_origin: tuple[int, int, int] | None = None,
    dropout_scale_BHTS: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    visible_BTS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what a part of the keys adds to the gradients of q, k, v and the bias: see `attention`.

    Autograd makes them of p = exp(score - lse), lse a constant: of sum(dout * (keep p) v) + sum((dlse - delta) p) where
    delta is the sum of dout * out over a head's features.
    """
    delta_BHT = (dout_BTHE.to(lse_BHT.dtype) * out_BTHE).sum(dim=-1).transpose(1, 2)
    lse_BHT1 = lse_BHT.masked_fill(lse_BHT == float("-inf"), float("inf"))[..., None]  # nothing seen: no probabilities
    weight_BHT = -delta_BHT if dlse_BHT is None else dlse_BHT - delta_BHT
    (samples, queries, heads, features), keys = q_BTHE.shape, k_BSGE.shape[1]
    within = within or (0, 0, queries, keys)
    if dropout > 0.0:
        assert seed is not None, "dropout takes a seed"
        shape = (samples, heads, queries, keys)
        dropout_scale_BHTS = _attention_dropout_scale(seed, dropout, shape, dropout_origin, within, q_BTHE)
    if documents is not None:
        visible_BTS = (documents[0][:, None] == documents[1])[None]
    place = place_of_first_query(within)
    hidden = hidden_keys(queries, keys, q_BTHE.device, causal, window, cu_seqlens, key_lengths, visible_BTS, place)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q_BTHE, k_BSGE, v_BSGE)]
        bias_HTS = None if bias_HTS is None else bias_HTS.detach().requires_grad_()
        q_BHTE, k_BHSE, v_BHSE = (
            x.transpose(1, 2).to(lse_BHT.dtype).repeat_interleave(heads // x.shape[2], dim=1) for x in leaves
        )
        products_BHTS = (q_BHTE * (features**-0.5 if scale is None else scale)) @ k_BHSE.transpose(-2, -1)
        scores_BHTS = biased_scores(products_BHTS, softcap, alibi_slopes, bias_HTS, place)
        probabilities_BHTS = torch.exp(scores_BHTS.masked_fill(hidden, float("-inf")) - lse_BHT1)
        sums_BHT = probabilities_BHTS.sum(dim=-1)
        if dropout_scale_BHTS is not None:
            probabilities_BHTS = probabilities_BHTS * dropout_scale_BHTS
        part_BTHE = (probabilities_BHTS @ v_BHSE).transpose(1, 2)
        wanted = leaves if bias_HTS is None else [*leaves, bias_HTS]
        gradients = torch.autograd.grad((part_BTHE, sums_BHT), wanted, (dout_BTHE.to(part_BTHE.dtype), weight_BHT))
    return gradients[0], gradients[1], gradients[2], None if bias_HTS is None else gradients[3]


def place_of_first_query(within: tuple[int, int, int, int]) -> int:
    """Return where the first query of a part of a matrix of scores stands among the part's keys: see `attention`."""
    first_query, first_key, queries, keys = within
    return first_query + keys - queries - first_key


def biased_scores(
    scores_BHTS: Tensor,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias_HTS: Tensor | None,
    place: int | None = None,
) -> Tensor:
    """Return softcap * tanh(scores / softcap) - slope * distance + bias, each where given; biases make it fp32.

    The first query stands at `place` among the keys; None: so that the last one stands at the last key.
    """
    queries, keys = scores_BHTS.shape[-2:]
    place = keys - queries if place is None else place
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if alibi_slopes is not None:
        places_T = torch.arange(place, place + queries, device=scores_BHTS.device)
        distance_TS = (places_T[:, None] - torch.arange(keys, device=scores_BHTS.device)).abs().to(wide)
        scores_BHTS = scores_BHTS.to(wide) - alibi_slopes.detach().to(wide)[:, None, None] * distance_TS
    return scores_BHTS if bias_HTS is None else scores_BHTS.to(wide) + bias_HTS.to(wide)


def hidden_keys(
    queries: int,
    keys: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
    visible_BTS: Tensor | None = None,
    place: int | None = None,
) -> Tensor:
    """Return which keys a query does not see: bool [T, S], or [B, 1, T, S] with key lengths or `visible_BTS`.

    The first query stands at `place` among the keys; None: so that the last one stands at the last key.
    """
    place = keys - queries if place is None else place
    place_T1 = torch.arange(place, place + queries, device=device)[:, None]
    key_S = torch.arange(keys, device=device)
    hidden = place_T1 < key_S if causal else torch.zeros(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        hidden = hidden | ((place_T1 - key_S).abs() >= window)
    if cu_seqlens is not None:
        document_S = torch.searchsorted(cu_seqlens, key_S, right=True)
        hidden = hidden | (document_S[:, None] != document_S)
    if key_lengths is not None:
        hidden = hidden | (key_S >= key_lengths[:, None, None, None])
    return hidden if visible_BTS is None else hidden | ~visible_BTS[:, None]


def _attention_dropout_scale(
    seed: int,
    rate: float,
    shape: tuple[int, ...],
    origin: tuple[int, int, int] | None,
    within: tuple[int, int, int, int],
    like: Tensor,
) -> Tensor:
    """Return the multipliers of the probabilities [B, H, T, S]: 0 or 1 / (1 - rate), for the place in `attention`."""
    heads = shape[1]
    first_query, first_key, queries, keys = within
    first_sample, first_head, all_heads = (0, 0, heads) if origin is None else origin
    b, h, t, s = (torch.arange(size, device=like.device).view(-1, *(1,) * (3 - dim)) for dim, size in enumerate(shape))
    index = (((first_sample + b) * all_heads + first_head + h) * queries + first_query + t) * keys + first_key + s
    wide = torch.promote_types(like.dtype, torch.float32)
    return dropout_keep(seed, rate, index).to(wide) / (1.0 - rate)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    row_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    dropout_origin: tuple[int, int, int] | None = None,
) -> Any:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last dim (Ba et al. 2016).

    With a residual (norm of sum, sum) where sum = residual + dropout(x + row_bias) in the dtype of x: see `layernorm`.
    """
    if residual is None:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    total = _residual_sum(x, residual, row_bias, dropout, seed, dropout_origin)
    return F.layer_norm(total, (x.shape[-1],), weight, bias, eps), total


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
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019).

    With a residual (norm of sum, sum) where sum = residual + dropout(x + row_bias) in the dtype of x: see `rmsnorm`.
    """
    if residual is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    total = _residual_sum(x, residual, row_bias, dropout, seed, dropout_origin)
    return F.rms_norm(total, (x.shape[-1],), weight, eps), total


def _residual_sum(
    x: Tensor,
    residual: Tensor,
    row_bias: Tensor | None,
    rate: float,
    seed: int | None,
    origin: tuple[int, int, int] | None,
) -> Tensor:
    """Return residual + dropout(x + row_bias), computed in fp32 or wider, in the dtype of x."""
    value = x if row_bias is None else x.to(torch.promote_types(x.dtype, torch.float32)) + row_bias
    if rate > 0.0:
        assert seed is not None, "dropout takes a seed"
        return dropout(value, dropout=rate, seed=seed, dropout_origin=origin, residual=residual).to(x.dtype)
    return (value + residual).to(x.dtype)


def scaled_masked_softmax(x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return softmax(scale * x) over the last dim of x [..., T, S], in fp32 or wider, in the dtype of x.

    Only what `mask` (bool, broadcastable to x) and `causal` (position t sees s <= t + S - T) leave visible takes part;
    all else, and a row of which nothing is visible, is 0.
    """
    scores = scale * x.to(torch.promote_types(x.dtype, torch.float32))
    visible = mask
    if causal:
        queries, keys = x.shape[-2:]
        past = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        visible = past if mask is None else mask & past
    if visible is None:
        return torch.softmax(scores, dim=-1).to(x.dtype)
    hidden = ~visible
    return torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1).masked_fill(hidden, 0.0).to(x.dtype)


def apply_rotary(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (j, j + R/2) of every head by the angles whose cosine and sine are given.

    x' = x * cos + (-x2, x1) * sin with x = (x1, x2) split in halves (Su et al. 2021, the half-split form). Computed in
    the tables' dtype, which should be fp32 or wider. The tables are [T, R], or [B, T, R] for rows of their own; the
    features from R on pass through.
    """
    turned = cos_TE.shape[-1]
    if turned < x_BTHE.shape[-1]:
        first, rest = x_BTHE.split((turned, x_BTHE.shape[-1] - turned), dim=-1)
        return torch.cat((apply_rotary(first, cos_TE, sin_TE), rest), dim=-1)
    half = turned // 2
    crossed = torch.cat((-x_BTHE[..., half:], x_BTHE[..., :half]), dim=-1)
    return (x_BTHE * cos_TE[..., None, :] + crossed * sin_TE[..., None, :]).to(x_BTHE.dtype)


def gelu(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form of GPT-2 (Hendrycks and Gimpel 2016).

    torch's slope is NaN beyond 1.8e19, where x^2 overflows; the kernel's is 0 or 1 there.
    """
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020)."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up with the tanh form of gelu (Shazeer 2020)."""
    return gelu(gate) * up


def swiglu_packed(x: Tensor) -> Tensor:
    """Return silu(gate) * up for x [..., 2F] = (gate, up) side by side."""
    return swiglu(*x.chunk(2, dim=-1))


def geglu_packed(x: Tensor) -> Tensor:
    """Return gelu(gate) * up for x [..., 2F] = (gate, up) side by side."""
    return geglu(*x.chunk(2, dim=-1))


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return gelu(x + bias) in the dtype of x; without a bias gelu(x)."""
    return gelu(x) if bias is None else gelu(x + bias).to(x.dtype)


def _philox(seed: int, low: Tensor, high: Tensor, third: int, fourth: int) -> Tensor:
    """Return the four words [..., 4] of Philox4x32-10 at counters of four 32-bit words under the 64-bit key `seed`.

    Words are int64 of 0 .. 2^32-1. Source: Salmon, Moraes, Dror, Shaw 2011, section 3.3.
    """
    mask = 0xFFFFFFFF
    a, b, c, d = low, high, torch.full_like(low, third), torch.full_like(low, fourth)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57  # the upper halves come out right although int64 is signed: & mask
        a, b, c, d = ((y >> 32) & mask) ^ b ^ k0, y & mask, ((x >> 32) & mask) ^ d ^ k1, x & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((a, b, c, d), dim=-1)


def dropout_keep(seed: int, rate: float, index: Tensor) -> Tensor:
    """Return which elements are kept: a bool mask for int64 linear indices into the whole logical tensor.

    Element n takes word n % 4 of Philox4x32-10 at counter n // 4 under the 64-bit key `seed` and is kept where the
    word's upper 24 bits are at least ceil(rate * 2^24) (Salmon et al. 2011).
    """
    counter = index >> 2
    words = _philox(seed, counter & 0xFFFFFFFF, (counter >> 32) & 0xFFFFFFFF, 0, 0)
    word = words.gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)
    return (word >> 8) >= math.ceil(rate * 2**24)


def dropout(
    x_BTD: Tensor,
    *,
    dropout: float,
    seed: int,
    dropout_origin: tuple[int, int, int] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x with elements dropped at the rate `dropout`, the others scaled by 1 / (1 - rate), plus `residual`.

    Element (b, t, d) has the linear index ((first_sample + b) * all_tokens + first_token + t) * D + d with
    `dropout_origin` = (first_sample, first_token, all_tokens), by default (0, 0, T).
    """
    samples, tokens, features = x_BTD.shape
    first_sample, first_token, all_tokens = (0, 0, tokens) if dropout_origin is None else dropout_origin
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    rows_BT1, columns_T1, features_D = (
        torch.arange(size, device=x_BTD.device).view(shape)
        for size, shape in ((samples, (-1, 1, 1)), (tokens, (-1, 1)), (features, (-1,)))
    )
    index = ((first_sample + rows_BT1) * all_tokens + first_token + columns_T1) * features + features_D
    y = x_BTD.to(wide) * (dropout_keep(seed, dropout, index).to(wide) / (1.0 - dropout))
    return (y if residual is None else y + residual).to(x_BTD.dtype)


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return losses_N = (1 - s) (lse - x_target) + s (lse - mean(x)) + z lse^2 in fp32 (fp64 for fp64 logits).

    lse is the row's logsumexp, s `label_smoothing`, z `z_loss`. Rows whose target is `ignore_index` have loss and
    gradient 0; a target that is no index of the row gives NaN.
    """
    vocab = logits_NV.shape[1]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    inside_N = (targets_N >= 0) & (targets_N < vocab)
    ignored_N = targets_N == ignore_index
    log_p_NV = torch.log_softmax(logits_NV, dim=1)
    losses_N = (label_smoothing - 1.0) * log_p_NV.gather(1, targets_N.masked_fill(~inside_N, 0)[:, None])[:, 0]
    if label_smoothing:
        losses_N = losses_N - (label_smoothing / vocab) * log_p_NV.sum(dim=1)
    if z_loss:
        losses_N = losses_N + z_loss * torch.logsumexp(logits_NV, dim=1).square()
    wrong_N = ~(inside_N | ignored_N)
    losses_N = losses_N * torch.ones_like(losses_N).masked_fill(wrong_N, math.nan)  # a product: gradients are NaN too
    return losses_N.masked_fill(ignored_N, 0.0)


def cross_entropy_statistics(
    logits_NVt: Tensor, local_targets_N: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (max_N, sumexp_N, target_logit_N, logit_sum_N) over the first `columns` columns, in fp32 or fp64.

    sumexp is the sum of exp(x - max). The target's logit is 0 where the target lies outside 0 .. columns - 1.
    """
    wide = torch.promote_types(logits_NVt.dtype, torch.float32)
    rows = logits_NVt.shape[0]
    if columns == 0:
        zeros_N = logits_NVt.new_zeros(rows, dtype=wide)
        return torch.full_like(zeros_N, -math.inf), zeros_N, zeros_N.clone(), zeros_N.clone()
    real_NV = logits_NVt[:, :columns].to(wide)
    max_N = real_NV.amax(dim=1)
    shift_N = max_N.masked_fill(max_N == -math.inf, 0.0)  # -inf - -inf is no number
    sumexp_N = (real_NV - shift_N[:, None]).exp_().sum(dim=1)
    mine_N = (local_targets_N >= 0) & (local_targets_N < columns)
    target_logit_N = real_NV.gather(1, local_targets_N.masked_fill(~mine_N, 0)[:, None])[:, 0].masked_fill(~mine_N, 0.0)
    return max_N, sumexp_N, target_logit_N, real_NV.sum(dim=1)


def cross_entropy_losses(
    max_N: Tensor,
    sumexp_N: Tensor,
    target_logit_N: Tensor,
    logit_sum_N: Tensor,
    *,
    vocab: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses_N, lse_N, lse_rest_N) of the statistics of whole rows of `vocab` columns.

    The statistics of several shards are merged before: the greatest max, sumexp * exp(max - greatest) summed, the
    others summed. lse + lse_rest is the logsumexp beyond the precision of one number: where logits are large, rounding
    lse alone would be the greatest error of the gradient.
    """
    log_sum_N = sumexp_N.log()
    lse_N = max_N + log_sum_N
    losses_N = (1.0 - label_smoothing) * ((max_N - target_logit_N) + log_sum_N)
    if label_smoothing:
        losses_N = losses_N + label_smoothing * ((max_N - logit_sum_N / vocab) + log_sum_N)
    if z_loss:
        losses_N = losses_N + z_loss * lse_N.square()
    return losses_N, lse_N, log_sum_N - (lse_N - max_N)


def cross_entropy_gradient_(
    logits_NVt: Tensor,
    local_targets_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    *,
    columns: int,
    vocab: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lse_rest_N: Tensor | None = None,
) -> None:
    """Overwrite the logits by grad * ((1 + 2 z lse) p - (1 - s) [v = target] - s / vocab), with p = exp(x - lse).

    Columns from `columns` on and rows whose grad_N is 0 become exactly 0.
    """
    real_NV = logits_NVt[:, :columns]
    wide = torch.promote_types(logits_NVt.dtype, torch.float32)
    lse_N, grad_N = lse_N.to(wide), grad_N.to(wide)
    gradient_NV = real_NV.to(wide).sub_(lse_N[:, None])  # the logits themselves, or a copy of more precision
    if lse_rest_N is not None:
        gradient_NV.sub_(lse_rest_N.to(wide)[:, None])
    gradient_NV.exp_()
    if z_loss:
        gradient_NV.mul_((1.0 + 2.0 * z_loss * lse_N)[:, None])
    if columns:
        mine_N = (local_targets_N >= 0) & (local_targets_N < columns)
        at_target_N = torch.full_like(lse_N, label_smoothing - 1.0).masked_fill_(~mine_N, 0.0)
        gradient_NV.scatter_add_(1, local_targets_N.masked_fill(~mine_N, 0)[:, None], at_target_N[:, None])
    if label_smoothing:
        gradient_NV.sub_(label_smoothing / vocab)
    gradient_NV.mul_(grad_N[:, None]).masked_fill_((grad_N == 0.0)[:, None], 0.0)
    if real_NV.dtype is not wide:
        real_NV.copy_(gradient_NV)
    logits_NVt[:, columns:] = 0.0


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the `cross_entropy` of the logits hidden weight^T."""
    return cross_entropy(
        F.linear(hidden_ND, weight_VD),
        targets_N,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def linear_cross_entropy_statistics(
    hidden_ND: Tensor, weight_VtD: Tensor, local_targets_N: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the `cross_entropy_statistics` of the logits hidden weight^T."""
    return cross_entropy_statistics(F.linear(hidden_ND, weight_VtD[:columns]), local_targets_N, columns)


def linear_cross_entropy_gradients(
    hidden_ND: Tensor,
    weight_VtD: Tensor,
    local_targets_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    *,
    columns: int,
    vocab: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    need_hidden: bool = True,
    need_weight: bool = True,
    lse_rest_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (this shard's part of dhidden, dweight), from logits that are computed again; empty where not needed."""
    gradient_NV = F.linear(hidden_ND, weight_VtD[:columns])
    cross_entropy_gradient_(
        gradient_NV,
        local_targets_N,
        lse_N,
        grad_N,
        columns=columns,
        vocab=vocab,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        lse_rest_N=lse_rest_N,
    )
    d_hidden = gradient_NV @ weight_VtD[:columns] if need_hidden else hidden_ND.new_empty(0)
    d_weight = weight_VtD.new_empty(0)
    if need_weight:
        d_weight = torch.zeros_like(weight_VtD)
        d_weight[:columns] = gradient_NV.T @ hidden_ND
    return d_hidden, d_weight


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the rows of the weight that the tokens (int64, any shape) name: [..., D]."""
    return F.embedding(tokens, weight_VD)


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Return y_NF: the first counts[0] rows of x times weight[0]^T, the next counts[1] times weight[1]^T, and so on.

    Rows beyond the sum of the counts get zeros; RuntimeError if the sum is above N. It is an opaque operation, as it
    reads the counts on the host, which neither a compiled graph nor a tensor without memory could be part of.
    """
    return _grouped_products(x_ND, weight_EFD, counts_E)


@torch.library.custom_op("megalm::plain_grouped_matmul", mutates_args=())
def _grouped_products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], weight.shape[1]))
    for x_rows, y_rows, matrix in zip(_by_expert(x, counts), _by_expert(y, counts), weight.unbind(), strict=True):
        if len(x_rows):
            torch.mm(x_rows, matrix.t(), out=y_rows)
    return y


@_grouped_products.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op("megalm::plain_grouped_matmul_weight", mutates_args=())
def _grouped_weight_gradients(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Return dy^T x over the rows of each expert, [E, F, D]."""
    dweight = x.new_zeros((counts.shape[0], dy.shape[1], x.shape[1]))
    for dy_rows, x_rows, matrix in zip(_by_expert(dy, counts), _by_expert(x, counts), dweight.unbind(), strict=True):
        if len(x_rows):
            torch.mm(dy_rows.t(), x_rows, out=matrix)
    return dweight


@_grouped_weight_gradients.register_fake
def _(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty((counts.shape[0], dy.shape[1], x.shape[1]))


def _by_expert(rows: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    sizes = counts.tolist()
    return rows.split([*sizes, rows.shape[0] - sum(sizes)])[:-1]


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    need_x, need_weight, _ = ctx.needs_input_grad
    dx = _grouped_products(dy, weight.transpose(1, 2), counts) if need_x else None
    return dx, _grouped_weight_gradients(dy, x, counts) if need_weight else None, None


_grouped_products.register_autograd(_grouped_gradients, setup_context=_save_inputs)


def grad_norm(tensors: Sequence[Tensor], *, squared: bool = False) -> Tensor:
    """Return the L2 norm over all elements of all tensors, or its square: 0-dim, fp32 (fp64 if one tensor is)."""
    if not tensors:
        return torch.zeros(())
    wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    square = torch.stack([_sum_of_squares(t) for t in tensors]).sum()
    return (square if squared else square.sqrt()).to(wide)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares in fp64. A CPU's fp32 norm of a long tensor is off by 7e-4 at 2^24 elements."""
    flat = x.reshape(-1)
    whole = flat.numel() // _RUN * _RUN
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for runs in (flat[:whole].view(-1, _RUN), flat[whole:].view(1, -1)):
        norms = torch.linalg.vector_norm(runs, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        total = total + norms.double().square().sum()
    return total


def fused_adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    step: int,
    masters: Sequence[Tensor] | None = None,
    gradient_scale: Tensor | float | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """Do step number `step` (from 1) of AdamW in place (Loshchilov and Hutter 2019, algorithm 2).

    p = p - lr wd p - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps), in fp32 or wider; every operation is
    rounded on its own. With `masters` these are updated and the weights are their rounded copies. Otherwise a weight
    is rounded to the nearest, or if it is bf16 by random bits under `stochastic_rounding`. If `gradient_scale`, which
    multiplies the gradients, is not finite nothing changes; to know that this function waits for the device.
    """
    scale = 1.0 if gradient_scale is None else float(gradient_scale)
    if not weights or not math.isfinite(scale):
        return
    types = [torch.promote_types(weight.dtype, torch.float32) for weight in weights]
    decays = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * len(weights)
    rates = (torch.tensor(decays, dtype=torch.float32) * torch.tensor(lr, dtype=torch.float32)).tolist()
    rates = [lr * decay if t is torch.float64 else rate for t, decay, rate in zip(types, decays, rates, strict=True)]
    with torch.no_grad():
        p, m, v, g = (
            [x.to(t) for x, t in zip(tensors, types, strict=True)]  # the tensor itself where it has the type
            for tensors in (masters or weights, exp_avgs, exp_avg_sqs, gradients)
        )
        if gradient_scale is not None:
            g = list(torch._foreach_mul(g, scale))
        torch._foreach_mul_(m, betas[0])
        torch._foreach_add_(m, torch._foreach_mul(g, 1.0 - betas[0]))
        squares = torch._foreach_mul(g, g)
        torch._foreach_mul_(squares, 1.0 - betas[1])
        torch._foreach_mul_(v, betas[1])
        torch._foreach_add_(v, squares)
        # By way of float64: fp32 roots of a CPU (MKL) are off by one in the last bit of every fifth number.
        change = [x.double().sqrt().to(x.dtype) for x in v]
        torch._foreach_mul_(change, 1.0 / math.sqrt(1.0 - betas[1] ** step))
        torch._foreach_add_(change, eps)
        change = list(torch._foreach_div(m, change))
        torch._foreach_mul_(change, lr / (1.0 - betas[0] ** step))
        torch._foreach_sub_(p, torch._foreach_mul(p, rates))
        torch._foreach_sub_(p, change)
        for held, computed in ((exp_avgs, m), (exp_avg_sqs, v), *([(masters, p)] if masters else [])):
            torch._foreach_copy_(list(held), list(computed))
        if stochastic_rounding:
            p = [
                _round_stochastically(value, number, step, seed) if weight.dtype is torch.bfloat16 else value
                for number, (weight, value) in enumerate(zip(weights, p, strict=True))
            ]
        torch._foreach_copy_(list(weights), p)


def _round_stochastically(value: Tensor, number: int, step: int, seed: int) -> Tensor:
    """Return fp32 values that bf16 can hold: 16 random bits are added below the last bit kept, then cut off.

    Element n takes the upper half of word n % 4 of Philox4x32-10 at counter (low half of n // 4, high half of n // 4,
    number, step) under the 64-bit key `seed`.
    """
    counter = torch.arange((value.numel() + 3) // 4, device=value.device)
    words = _philox(seed, counter & 0xFFFFFFFF, counter >> 32, number, step & 0xFFFFFFFF)
    words = words.flatten()[: value.numel()].view(value.shape)
    bits = value.view(torch.int32) + (words >> 16).int()
    return torch.where(value.isnan(), value, ((bits >> 16) << 16).view(torch.float32))
