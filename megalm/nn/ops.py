"""The operations of the model, each in two implementations: the only import of `megalm.kernels`.

Layers are given an `Operations` and call its fields; which one it is, is decided once, when a model is built. The fused
kernels serve CUDA, plain torch everything else and every comparison. Dropout is the one place where they are called
differently: the kernels draw its masks themselves, plain torch is given them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.errors import ConfigError
from megalm.kernels import reference
from megalm.kernels.reference import cross_entropy_losses as cross_entropy_losses
from megalm.kernels.reference import dropout_keep as dropout_keep
from megalm.kernels.reference import flash_attention as plain_attention
from megalm.nn.activations import geglu, gelu
from megalm.nn.masks import Documents, Drop, kept


@dataclass(frozen=True)
class Operations:
    """What layers compute with. Shapes, dtypes and formulas are those of `megalm.kernels.reference`.

    `partial_attention` gives (out, lse) of the part `within` of a causal matrix of scores (see `kernels.attention`), in
    which `documents` are the numbers of its queries and of its keys; `partial_attention_gradients` takes (dout, dlse,
    out, lse) of whole rows before q, k and v and gives their gradients and the bias's. Attention takes `window`,
    `softcap`, `slopes_H` (ALiBi), `bias_HTS` (added to the scores), `documents` and `return_lse` beside q, k and v.
    `drop` is a Drop or None (nothing is dropped). With `residual` a norm returns (normed, sum) of the sum residual +
    dropped x; `dropout` adds it. `swiglu` and `geglu` take gate and up side by side in the last dim. `grouped_matmul`
    takes x_ND, whose rows stand by expert, w_EFD and counts_E (int64, the rows of each) to y_NF = x w_e^T.
    """

    flash_attention: Callable[..., Any]
    partial_attention: Callable[..., tuple[Tensor, Tensor]]
    partial_attention_gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    unfused_attention: Callable[..., Any]
    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    dropout: Callable[..., Tensor]
    apply_rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    geglu: Callable[[Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    embedding: Callable[[Tensor, Tensor], Tensor]
    grouped_matmul: Callable[[Tensor, Tensor, Tensor], Tensor]
    cross_entropy_statistics: Callable[..., tuple[Tensor, ...]]
    cross_entropy_gradient_: Callable[..., None]
    linear_cross_entropy_statistics: Callable[..., tuple[Tensor, ...]]
    linear_cross_entropy_gradients: Callable[..., tuple[Tensor, Tensor]]
    adamw_: Callable[..., None]
    grad_norm: Callable[..., Tensor]
    widest_head: float = float("inf")
    """Features of a head that flash attention takes at most."""


def select_operations(kernels: str, device: torch.device) -> Operations:
    """Return what `model.kernels` chooses: "auto" is "fused" on CUDA and "reference" elsewhere.

    On the meta device either gives shapes alone, and runs no kernel.
    Raises ConfigError where the fused kernels are asked for and cannot run.
    """
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return REFERENCE
    if device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"model.kernels=fused needs a CUDA device and this run computes on {device.type}; use auto")
    return fused_operations()


def _multipliers(drop: Drop, shape: Sequence[int], starts: Sequence[int], like: Tensor) -> Tensor:
    """Return 0 or 1 / (1 - rate) for a slice of the site's tensor, in fp32 or wider where `like` is; see `kept`."""
    stay = kept(drop.keys, drop.site, drop.rate, shape, starts, like)
    return stay.to(torch.promote_types(like.dtype, torch.float32)).mul_(1.0 / (1.0 - drop.rate))


def _attention(
    q_BTHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    *,
    drop: Drop | None = None,
    slopes_H: Tensor | None = None,
    documents: Documents | None = None,
    **options: Any,
) -> Any:
    scale_BHTS = None
    if drop is not None:
        rows, tokens, heads, _ = q_BTHE.shape
        keys = k_BSGE.shape[1]
        like_BHTS = q_BTHE.new_empty(()).expand(rows, heads, tokens, keys)
        scale_BHTS = _multipliers(drop, (drop.whole, tokens, keys), (drop.first, 0, 0), like_BHTS)
    return plain_attention(
        q_BTHE,
        k_BSGE,
        v_BSGE,
        alibi_slopes=slopes_H,
        visible_BTS=None if documents is None else documents.visible_BTS,
        dropout_scale_BHTS=scale_BHTS,
        **options,
    )


def _partial(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """Return a function of a part of a causal matrix of scores in plain torch."""

    def run(
        *tensors: Tensor,
        within: tuple[int, int, int, int],
        drop: Drop | None = None,
        slopes_H: Tensor | None = None,
        documents: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        q_BTHE, k_BSGE = tensors[-3:-1]
        scale_BHTS = None
        if drop is not None:
            like_BHTS = q_BTHE.new_empty(()).expand(len(q_BTHE), q_BTHE.shape[2], q_BTHE.shape[1], k_BSGE.shape[1])
            first_query, first_key, queries, keys = within
            scale_BHTS = _multipliers(
                drop, (drop.whole, queries, keys), (drop.first, first_query, first_key), like_BHTS
            )
        return function(
            *tensors,
            causal=True,
            within=within,
            alibi_slopes=slopes_H,
            visible_BTS=None if documents is None else documents[0][:, :, None] == documents[1][:, None],
            dropout_scale_BHTS=scale_BHTS,
            **options,
            **more,
        )

    return run


def _by_runs(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation with dropout that takes x's tokens, where they are several runs, one run after the other."""

    def run(x_BTD: Tensor, *rest: Any, drop: Drop | None = None, residual: Tensor | None = None, **how: Any) -> Any:
        if drop is None or not drop.places:
            return operation(x_BTD, *rest, drop=drop, residual=residual, **how)
        sizes = [count for _, count in drop.places]
        residuals = [None] * len(sizes) if residual is None else residual.split(sizes, dim=1)
        results = [
            operation(x, *rest, drop=replace(drop, first=first, places=()), residual=added, **how)
            for x, (first, _), added in zip(x_BTD.split(sizes, dim=1), drop.places, residuals, strict=True)
        ]
        if isinstance(results[0], tuple):
            return tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
        return torch.cat(results, dim=1)

    return run


def _dropout(x_BTD: Tensor, drop: Drop | None, residual: Tensor | None = None) -> Tensor:
    if drop is not None:
        scale_BTD = _multipliers(drop, (drop.whole, x_BTD.shape[-1]), (drop.first, 0), x_BTD)
        x_BTD = (x_BTD * scale_BTD).to(x_BTD.dtype)
    return x_BTD if residual is None else residual + x_BTD


def _unfused_attention(softmax: Callable[..., Tensor], dropout: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return attention that makes the whole matrix of scores, [B, H, T, S], around a softmax."""

    def attend(
        q_BTHE: Tensor,
        k_BSGE: Tensor,
        v_BSGE: Tensor,
        *,
        causal: bool,
        drop: Drop | None = None,
        window: int | None = None,
        softcap: float | None = None,
        slopes_H: Tensor | None = None,
        bias_HTS: Tensor | None = None,
        documents: Documents | None = None,
        return_lse: bool = False,
    ) -> Any:
        q_BHTE, k_BGSE, v_BGSE = (x.transpose(1, 2) for x in (q_BTHE, k_BSGE, v_BSGE))
        repeats = q_BHTE.shape[1] // k_BGSE.shape[1]
        k_BHSE, v_BHSE = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k_BGSE, v_BGSE))
        scores_BHTS, scale = q_BHTE @ k_BHSE.transpose(-2, -1), q_BHTE.shape[-1] ** -0.5
        if softcap is not None or slopes_H is not None or bias_HTS is not None or return_lse:
            wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
            scores_BHTS, scale = reference.biased_scores(scores_BHTS.to(wide) * scale, softcap, slopes_H, bias_HTS), 1.0
        visible_BTS = None if documents is None else documents.visible_BTS
        sight = (*scores_BHTS.shape[-2:], q_BTHE.device)
        hides = window is not None or documents is not None
        mask = ~reference.hidden_keys(*sight, False, window, visible_BTS=visible_BTS) if hides else None
        probabilities_BHTS = softmax(scores_BHTS, scale=scale, mask=mask, causal=causal).to(v_BHSE.dtype)
        if drop is not None:  # heads stand where tokens do, a head's T x S probabilities where features do
            probabilities_BHTS = dropout(probabilities_BHTS.flatten(2), drop=drop).view_as(probabilities_BHTS)
        out_BTHE = (probabilities_BHTS @ v_BHSE).transpose(1, 2)
        if not return_lse:
            return out_BTHE
        hidden = reference.hidden_keys(*sight, causal, window, visible_BTS=visible_BTS)
        return out_BTHE, torch.logsumexp(scores_BHTS.masked_fill(hidden, float("-inf")), dim=-1)

    return attend


def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    drop: Drop | None = None,
) -> Any:
    if residual is None:
        return reference.layer_norm(x, weight, bias, eps=eps)
    total = _dropout(x, drop, residual)
    return reference.layer_norm(total, weight, bias, eps=eps), total


def _rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, drop: Drop | None = None
) -> Any:
    if residual is None:
        return reference.rms_norm(x, weight, eps=eps)
    total = _dropout(x, drop, residual)
    return reference.rms_norm(total, weight, eps=eps), total


def _drawing(drop: Drop | None) -> dict[str, Any]:
    """Return the dropout in the kernels' words."""
    if drop is None:
        return {}
    return {"dropout": drop.rate, "seed": drop.stream, "dropout_origin": drop.origin}


REFERENCE = Operations(
    flash_attention=_attention,
    partial_attention=_partial(plain_attention, return_lse=True),
    partial_attention_gradients=_partial(reference.flash_attention_gradients),
    unfused_attention=_unfused_attention(reference.scaled_masked_softmax, _dropout),
    layer_norm=_by_runs(_layer_norm),
    rms_norm=_by_runs(_rms_norm),
    dropout=_by_runs(_dropout),
    apply_rotary=reference.apply_rotary,
    gelu=gelu,
    geglu=geglu,
    swiglu=reference.swiglu_packed,
    embedding=lambda tokens, weight_VD: F.embedding(tokens, weight_VD),
    grouped_matmul=reference.grouped_matmul,
    cross_entropy_statistics=reference.cross_entropy_statistics,
    cross_entropy_gradient_=reference.cross_entropy_gradient_,
    linear_cross_entropy_statistics=reference.linear_cross_entropy_statistics,
    linear_cross_entropy_gradients=reference.linear_cross_entropy_gradients,
    adamw_=reference.fused_adamw_,
    grad_norm=reference.grad_norm,
)


def _fused_attention(flash_attention: Callable[..., Any]) -> Callable[..., Any]:
    """Return attention by the kernels: documents as one row, and a learned bias in plain torch."""

    def attend(
        q_BTHE: Tensor,
        k_BSGE: Tensor,
        v_BSGE: Tensor,
        *,
        drop: Drop | None = None,
        slopes_H: Tensor | None = None,
        bias_HTS: Tensor | None = None,
        documents: Documents | None = None,
        **options: Any,
    ) -> Any:
        if bias_HTS is not None:  # it is a matrix of scores by itself
            options |= {"slopes_H": slopes_H, "bias_HTS": bias_HTS, "documents": documents}
            return _attention(q_BTHE, k_BSGE, v_BSGE, drop=drop, **options)
        options |= {"alibi_slopes": slopes_H, **_drawing(drop)}
        if documents is None:
            return flash_attention(q_BTHE, k_BSGE, v_BSGE, **options)
        assert documents.starts is not None, "the kernels need the starts of documents"
        assert drop is None, "rows laid end to end have no dropout mask of their own"
        one_row = [_as_one_row(x) for x in (q_BTHE, k_BSGE, v_BSGE)]
        result = flash_attention(*one_row, cu_seqlens=documents.starts, **options)
        if not options.get("return_lse"):
            return _as_rows(result, len(q_BTHE))
        return tuple(_as_rows(x, len(q_BTHE)) for x in result)

    return attend


def _fused_partial(function: Callable[..., Any], plain: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """Return the kernels' function of a part of a causal matrix of scores: documents as one row, a bias in `plain`."""

    def run(
        *tensors: Tensor,
        drop: Drop | None = None,
        slopes_H: Tensor | None = None,
        bias_HTS: Tensor | None = None,
        documents: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        if bias_HTS is not None:
            options |= {"drop": drop, "slopes_H": slopes_H, "bias_HTS": bias_HTS, "documents": documents}
            return plain(*tensors, **options)
        options |= {"causal": True, "alibi_slopes": slopes_H, **_drawing(drop), **more}
        if documents is None:
            results = function(*tensors, **options)
        else:
            assert drop is None, "rows laid end to end have no dropout mask of their own"
            apart = torch.arange(len(documents[0]), device=documents[0].device)[:, None] * (options["within"][3] + 1)
            rows = tuple((numbers + apart).flatten() for numbers in documents)
            one_row = [x if x is None else _as_one_row(x) for x in tensors]
            results = function(*one_row, documents=rows, **options)
            results = [_as_rows(x, len(documents[0])) for x in results]
        return (*results, None) if len(results) == 3 else tuple(results)

    return run


def _as_one_row(x: Tensor) -> Tensor:
    """Return rows laid end to end: [1, B T, H, E] of [B, T, H, E], and [1, H, B T] of [B, H, T]."""
    return x.flatten(0, 1)[None] if x.dim() == 4 else x.transpose(0, 1).flatten(1)[None]


def _as_rows(x: Tensor, rows: int) -> Tensor:
    """Undo `_as_one_row`."""
    return x[0].unflatten(0, (rows, -1)) if x.dim() == 4 else x[0].unflatten(1, (rows, -1)).transpose(0, 1)


@functools.cache
def fused_operations() -> Operations:
    """Return the Triton kernels. They are imported here, so that a machine without Triton trains on its CPU."""
    from megalm.kernels import (
        activations,
        adamw,
        attention,
        cross_entropy,
        dropout,
        embedding,
        grad_norm,
        grouped_matmul,
        layernorm,
        linear_cross_entropy,
        rmsnorm,
        rotary,
        softmax,
    )

    def add_dropped(x_BTD: Tensor, drop: Drop | None, residual: Tensor | None = None) -> Tensor:
        if drop is None:
            return x_BTD if residual is None else residual + x_BTD
        return dropout.dropout(x_BTD, residual=residual, **_drawing(drop))

    return Operations(
        flash_attention=_fused_attention(attention.flash_attention),
        partial_attention=_fused_partial(attention.flash_attention, REFERENCE.partial_attention, return_lse=True),
        partial_attention_gradients=_fused_partial(
            attention.flash_attention_gradients, REFERENCE.partial_attention_gradients
        ),
        unfused_attention=_unfused_attention(softmax.scaled_masked_softmax, add_dropped),
        layer_norm=_by_runs(
            lambda x, weight, bias, *, eps, residual=None, drop=None: layernorm.layer_norm(
                x, weight, bias, eps=eps, residual=residual, **_drawing(drop)
            )
        ),
        rms_norm=_by_runs(
            lambda x, weight, *, eps, residual=None, drop=None: rmsnorm.rms_norm(
                x, weight, eps=eps, residual=residual, **_drawing(drop)
            )
        ),
        dropout=_by_runs(add_dropped),
        apply_rotary=rotary.apply_rotary,
        gelu=lambda x: activations.bias_gelu(x, None),
        geglu=activations.geglu_packed,
        swiglu=activations.swiglu_packed,
        embedding=embedding.embedding,
        grouped_matmul=grouped_matmul.grouped_matmul,
        cross_entropy_statistics=cross_entropy.cross_entropy_statistics,
        cross_entropy_gradient_=cross_entropy.cross_entropy_gradient_,
        linear_cross_entropy_statistics=linear_cross_entropy.linear_cross_entropy_statistics,
        linear_cross_entropy_gradients=linear_cross_entropy.linear_cross_entropy_gradients,
        adamw_=adamw.fused_adamw_,
        grad_norm=grad_norm.grad_norm,
        widest_head=attention.WIDEST_HEAD,
    )
