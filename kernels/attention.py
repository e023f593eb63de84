"""Attention in tiles: softmax(scores) v without the matrix of scores in memory, forward and backward.

    x_ts = softcap tanh(scale q_t k_s / softcap) - slope |t - s|      (without softcap: scale q_t k_s - slope |t - s|)
    lse_t = log sum_s exp x_ts        p_ts = exp(x_ts - lse_t)        out_t = sum_s keep_ts / (1 - rate) p_ts v_s

s runs over the keys that t sees. For the gradients see `attention_backward`, for masks, bias and dropout
`attention_scores`. Only out and lse are kept for the backward pass.
Source: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2); the cap: Gemma 2, 2024; the bias: Press et al.
2022 (ALiBi).
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from megalm.kernels import attention_hopper, launch, reference
from megalm.kernels.attention_arguments import WIDEST_HEAD as WIDEST_HEAD
from megalm.kernels.attention_arguments import alike, checked, kernel_arguments
from megalm.kernels.attention_backward import key_gradients, query_gradients
from megalm.kernels.attention_forward import forward

_LONGEST_ROW_STRIDE = 2**23  # a tile of at most 256 rows is addressed in 32 bits from its 64-bit first place


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
) -> Any:
    """Return softmax(q k^T * scale) v as BTHE; query head h reads key/value head h // (H / G).

    q, k and v have one dtype, which the result has too; E is at most 256. The kernels compute with heads padded to a
    power of two from 32 on: sizes 80 and 96 cost as much as 128, 160 and 192 as 256. `scale` defaults to 1 / sqrt(E).
    Query t stands at place t' = t + S - T among the keys, so that the last query meets the last key. It sees key s

    - under `causal` where s <= t'; with `window` where |t' - s| < window;
    - with `cu_seqlens` (int32 [D + 1], ascending from 0 to T) in its own document only: document d are the tokens
      cu_seqlens[d] .. cu_seqlens[d + 1] - 1 of the one row (B = 1, T = S). Its values are not checked;
    - with `documents` (integers [T] and [S] that do not fall, B = 1) where the query's number is the key's;
    - with `key_lengths` (int32 [B]) where s < key_lengths[b].

    A query that sees no key gets zeros, and -inf as lse. Scores become softcap * tanh(score / softcap) with `softcap`,
    then lose slope * |t' - s| with `alibi_slopes` (fp32 [H]). `dropout` is the rate at which probabilities are dropped,
    `seed` its Philox key (0 .. 2^64-1); element (b, h, t, s) has the index
    (((first_sample + b) * all_heads + first_head + h) * T + t) * S + s with `dropout_origin` = (first_sample,
    first_head, all_heads), by default (0, 0, H). `within` = (first_query, first_key, T', S') makes q and k a part of a
    larger matrix of scores, T' x S': masks, biases and dropout are those of its rows from first_query and its columns
    from first_key on, its last query meets its last key, and parts over all keys merge by lse. With `return_lse` the
    result is (out, lse): lse fp32 [B, H, T] is the natural log of the sum of exp(score), before dropout. out and lse
    have gradients for q, k and v, none else.
    Raises ValueError for shapes, dtypes or values other than these.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "cu_seqlens": cu_seqlens,
        "key_lengths": key_lengths,
        "dropout": dropout,
        "seed": seed,
        "dropout_origin": dropout_origin,
        "documents": documents,
        "within": within,
    }
    if not checked(q_BTHE, k_BSGE, v_BSGE, **options):
        return reference.flash_attention(q_BTHE, k_BSGE, v_BSGE, return_lse=return_lse, **options)
    inputs = (q_BTHE, k_BSGE, v_BSGE)
    out_BTHE, lse_BHT = torch.ops.megalm.attention_forward(*inputs, *_op_arguments(q_BTHE, k_BSGE, **options))
    return (out_BTHE, lse_BHT) if return_lse else out_BTHE


def flash_attention_gradients(
    dout_BTHE: Tensor,
    dlse_BHT: Tensor | None,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    q_BTHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a part of the keys adds to the gradients of q, k and v, in their shapes and dtypes.

    `out` and `lse` (fp32) are those of the whole row of keys, of which k and v are a part as `options`, those of
    `flash_attention`, say; `dout` and `dlse` (None: zero) are their gradients. With all keys it is the backward pass.
    Source: Liu et al. 2023 (ring attention), section 3.
    """
    inputs = (dout_BTHE, dlse_BHT, out_BTHE, lse_BHT, q_BTHE, k_BSGE, v_BSGE)
    if not checked(q_BTHE, k_BSGE, v_BSGE, **options):
        return reference.flash_attention_gradients(*inputs, **options)[:3]
    gradients = torch.ops.megalm.attention_backward(*inputs, *_op_arguments(q_BTHE, k_BSGE, **options))
    return tuple(gradients)


def _op_arguments(
    q: Tensor,
    k: Tensor,
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
) -> tuple[Any, ...]:
    """Return the options as the ops take them, in their order."""
    return (
        alibi_slopes,
        cu_seqlens,
        key_lengths,
        *(documents or (None, None)),
        causal,
        0 if window is None else window,
        float(q.shape[3] ** -0.5 if scale is None else scale),
        0.0 if softcap is None else float(softcap),
        float(dropout),
        0 if seed is None else launch.signed_key(seed),
        list((0, 0, q.shape[2]) if dropout_origin is None else dropout_origin),
        list((0, 0, q.shape[1], k.shape[1]) if within is None else within),
    )


def _strided(x: Tensor) -> Tensor:
    """Return the tensor itself where kernels can read it in place: a head's numbers side by side, rows close enough."""
    return x if x.stride(-1) == 1 and x.stride(1) < _LONGEST_ROW_STRIDE else x.contiguous()


def _settings(kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the table's row for a kernel. Two things take registers and hence smaller tiles, so rows of their own.

    They are products in fp32, which run on other units, and what happens to every score: cap, bias, dropout.
    """
    fp32 = "_fp32" * (arguments["q"].dtype == torch.float32)
    extra = "_extra" * any(arguments[name] for name in ("SOFTCAP", "ALIBI", "DROPOUT"))
    return launch.settings("attention", kernel + fp32 + extra, arguments["WIDTH"])


@torch.library.custom_op("megalm::attention_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout: float,
    seed: int,
    origin: list[int],
    within: list[int],
) -> tuple[Tensor, Tensor]:
    """Return (out [B, T, H, E], lse fp32 [B, H, T]). window 0 and softcap 0 stand for none."""
    out, lse = _empty_results(q)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = (_strided(x) for x in (q, k, v))
    masks = (alibi_slopes, cu_seqlens, key_lengths, query_documents, key_documents)
    arguments = kernel_arguments(q, k, v, *masks, causal, window, scale, softcap, dropout, seed, origin, within)
    chosen = _settings("forward", arguments)
    arguments["FOLD"] = scale > 0.0 and not softcap and alibi_slopes is None
    if chosen.pop("specialized", False):
        tiles = launch.settings("attention", "specialized_forward", arguments["WIDTH"])
        if attention_hopper.serves(arguments, tiles):
            attention_hopper.launch_forward(out, lse, arguments, tiles)
            return out, lse
    forward[(triton.cdiv(q.shape[1], chosen["BLOCK_M"]) * q.shape[0] * q.shape[2],)](
        out=out, lse=lse, **arguments, **chosen
    )
    return out, lse


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    samples, queries, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((samples, heads, queries), dtype=torch.float32)


@_forward_op.register_fake
def _(q, *rest):
    return _empty_results(q)


@torch.library.custom_op("megalm::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout: float,
    seed: int,
    origin: list[int],
    within: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), each contiguous in the shape and dtype of its tensor."""
    if q.numel() == 0 or k.numel() == 0:
        return _zeros(q), _zeros(k), _zeros(v)
    q, k, v, dout = (_strided(x) for x in (q, k, v, dout))
    out, lse = out.contiguous(), lse.contiguous()
    masks = (alibi_slopes, cu_seqlens, key_lengths, query_documents, key_documents)
    arguments = kernel_arguments(q, k, v, *masks, causal, window, scale, softcap, dropout, seed, origin, within)
    (samples, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    arguments.update(zip(("d_b", "d_t", "d_h"), dout.stride(), strict=False))
    chosen, chosen_keys = (_settings(kernel, arguments) for kernel in ("query_gradients", "key_gradients"))
    rows = chosen["BLOCK_M"]
    assert rows % chosen_keys["BLOCK_M"] == 0, f"tiles of {rows} queries fill none of {chosen_keys['BLOCK_M']}"
    padded = triton.cdiv(queries, rows) * rows
    bits, delta = (q.new_empty((samples, heads, padded), dtype=torch.float32) for _ in range(2))
    arguments.update(dout=dout, bits=bits, delta=delta, padded=padded, scale=scale)

    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    query_gradients[(triton.cdiv(queries, chosen["BLOCK_M"]) * samples * heads,)](
        out=out,
        lse=lse,
        dlse=lse if dlse is None else dlse.contiguous(),
        dq=dq,
        WITH_DLSE=dlse is not None,
        **arguments,
        **chosen,
    )
    programs = triton.cdiv(keys, chosen_keys["BLOCK_N"]) * samples * groups
    shares = _shares(programs, heads // groups, launch.processors(q.device))
    dk, dv = (
        torch.empty((shares, *k.shape), dtype=k.dtype if shares == 1 else torch.float32, device=k.device)
        for _ in range(2)
    )
    if query_documents is not None and key_documents is not None:
        arguments.update(zip(("starts", "ends"), alike(key_documents, query_documents), strict=True))
    key_gradients[(programs * shares,)](dk=dk, dv=dv, B=samples, shares=shares, **arguments, **chosen_keys)
    if shares == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _shares(programs: int, group: int, processors: int) -> int:
    """Return over how many programs to split the query heads that share a key head, so that processors have work."""
    shares = 1
    while programs * shares < processors and group % (2 * shares) == 0:
        shares *= 2
    return shares


@_backward_op.register_fake
def _(dout, dlse, out, lse, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, dout, dlse):
    out, lse, *inputs = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 16
        dout = torch.zeros_like(out)
    gradients = torch.ops.megalm.attention_backward(dout, dlse, out, lse, *inputs, *ctx.rest)
    return *gradients, *(None,) * 13


_forward_op.register_autograd(_backward, setup_context=_setup)
