"""The operations of the model, each in two implementations: the only import of `megalm.kernels`.

Layers are given an `Operations` and call its fields; which one it is, is decided once, when a model is built. The fused
kernels serve CUDA, plain torch everything else and every comparison. Dropout is the one place where they are called
differently: the kernels draw its masks themselves, plain torch is given them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.distributed.random import keep_slice
from megalm.errors import ConfigError
from megalm.kernels import reference
from megalm.kernels.reference import cross_entropy_losses as cross_entropy_losses


@dataclass(frozen=True)
class Drop:
    """The dropout of one site in one forward pass: which elements fall is a function of these values alone.

    `stream` is the Philox key of site, seed and step. `origin` places a tensor in the site's logical one: (first
    sample, first token, tokens of a whole sample) for [B, T, D], (first sample, first head, heads of the whole model)
    for attention probabilities [B, H, T, S].
    """

    rate: float
    stream: int
    origin: tuple[int, int, int]


@dataclass(frozen=True)
class Operations:
    """What layers compute with. Shapes, dtypes and formulas are those of `megalm.kernels.reference`.

    `drop` is a Drop or None (nothing is dropped). With `residual` a norm returns (normed, sum) of the sum residual +
    dropped x; `dropout` adds it. `swiglu` takes gate and up side by side in the last dim.
    """

    flash_attention: Callable[..., Tensor]
    unfused_attention: Callable[..., Tensor]
    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    dropout: Callable[..., Tensor]
    apply_rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    embedding: Callable[[Tensor, Tensor], Tensor]
    cross_entropy_statistics: Callable[..., tuple[Tensor, ...]]
    cross_entropy_gradient_: Callable[..., None]
    linear_cross_entropy_statistics: Callable[..., tuple[Tensor, ...]]
    linear_cross_entropy_gradients: Callable[..., tuple[Tensor, Tensor]]
    adamw_: Callable[..., None]
    grad_norm: Callable[..., Tensor]


def select_operations(kernels: str, device: torch.device) -> Operations:
    """Return what `model.kernels` chooses: "auto" is "fused" on CUDA and "reference" elsewhere.

    Raises ConfigError where the fused kernels are asked for and cannot run.
    """
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return REFERENCE
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"model.kernels=fused needs a CUDA device and this run computes on {device.type}; use auto")
    return fused_operations()


def _multipliers(
    drop: Drop, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int], like: Tensor
) -> Tensor:
    """Return 0 or 1 / (1 - rate) for a slice of the site's tensor, in fp32 or wider where `like` is."""
    kept = keep_slice(drop.stream, drop.rate, shape, starts, lengths, like.device)
    return kept.to(torch.promote_types(like.dtype, torch.float32)).mul_(1.0 / (1.0 - drop.rate))


def _attention(q_BTHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, *, causal: bool, drop: Drop | None = None) -> Tensor:
    scale_BHTS = None
    if drop is not None:
        first_sample, first_head, all_heads = drop.origin
        rows, tokens, heads, _ = q_BTHE.shape
        keys = k_BSGE.shape[1]
        whole, starts = (first_sample + rows, all_heads, tokens, keys), (first_sample, first_head, 0, 0)
        scale_BHTS = _multipliers(drop, whole, starts, (rows, heads, tokens, keys), q_BTHE)
    return reference.flash_attention(q_BTHE, k_BSGE, v_BSGE, causal=causal, dropout_scale_BHTS=scale_BHTS)


def _dropout(x_BTD: Tensor, drop: Drop | None, residual: Tensor | None = None) -> Tensor:
    if drop is not None:
        first_sample, first_token, tokens = drop.origin
        rows, length, hidden = x_BTD.shape
        whole, starts = (first_sample + rows, tokens, hidden), (first_sample, first_token, 0)
        x_BTD = (x_BTD * _multipliers(drop, whole, starts, (rows, length, hidden), x_BTD)).to(x_BTD.dtype)
    return x_BTD if residual is None else residual + x_BTD


def _unfused_attention(softmax: Callable[..., Tensor], dropout: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return attention that makes the whole matrix of scores, [B, H, T, S], around a softmax."""

    def attend(q_BTHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, *, causal: bool, drop: Drop | None = None) -> Tensor:
        q_BHTE, k_BGSE, v_BGSE = (x.transpose(1, 2) for x in (q_BTHE, k_BSGE, v_BSGE))
        repeats = q_BHTE.shape[1] // k_BGSE.shape[1]
        k_BHSE, v_BHSE = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k_BGSE, v_BGSE))
        scores_BHTS = q_BHTE @ k_BHSE.transpose(-2, -1)
        probabilities_BHTS = softmax(scores_BHTS, scale=q_BHTE.shape[-1] ** -0.5, causal=causal)
        if drop is not None:  # heads stand where tokens do, a head's T x S probabilities where features do
            probabilities_BHTS = dropout(probabilities_BHTS.flatten(2), drop).view_as(probabilities_BHTS)
        return (probabilities_BHTS @ v_BHSE).transpose(1, 2)

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
    unfused_attention=_unfused_attention(reference.scaled_masked_softmax, _dropout),
    layer_norm=_layer_norm,
    rms_norm=_rms_norm,
    dropout=_dropout,
    apply_rotary=reference.apply_rotary,
    gelu=reference.gelu,
    swiglu=reference.swiglu_packed,
    embedding=lambda tokens, weight_VD: F.embedding(tokens, weight_VD),
    cross_entropy_statistics=reference.cross_entropy_statistics,
    cross_entropy_gradient_=reference.cross_entropy_gradient_,
    linear_cross_entropy_statistics=reference.linear_cross_entropy_statistics,
    linear_cross_entropy_gradients=reference.linear_cross_entropy_gradients,
    adamw_=reference.fused_adamw_,
    grad_norm=reference.grad_norm,
)


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
        flash_attention=lambda q, k, v, *, causal, drop=None: attention.flash_attention(
            q, k, v, causal=causal, **_drawing(drop)
        ),
        unfused_attention=_unfused_attention(softmax.scaled_masked_softmax, add_dropped),
        layer_norm=lambda x, weight, bias, *, eps, residual=None, drop=None: layernorm.layer_norm(
            x, weight, bias, eps=eps, residual=residual, **_drawing(drop)
        ),
        rms_norm=lambda x, weight, *, eps, residual=None, drop=None: rmsnorm.rms_norm(
            x, weight, eps=eps, residual=residual, **_drawing(drop)
        ),
        dropout=add_dropped,
        apply_rotary=rotary.apply_rotary,
        gelu=lambda x: activations.bias_gelu(x, None),
        swiglu=activations.swiglu_packed,
        embedding=embedding.embedding,
        cross_entropy_statistics=cross_entropy.cross_entropy_statistics,
        cross_entropy_gradient_=cross_entropy.cross_entropy_gradient_,
        linear_cross_entropy_statistics=linear_cross_entropy.linear_cross_entropy_statistics,
        linear_cross_entropy_gradients=linear_cross_entropy.linear_cross_entropy_gradients,
        adamw_=adamw.fused_adamw_,
        grad_norm=grad_norm.grad_norm,
    )
