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

from megalm.kernels import attention_hopper, launch, philox, reference
from megalm.kernels.attention_backward import key_gradients, query_gradients
from megalm.kernels.attention_forward import forward

WIDEST_HEAD = 256
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
    if not _checked(q_BTHE, k_BSGE, v_BSGE, **options):
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
    if not _checked(q_BTHE, k_BSGE, v_BSGE, **options):
        return reference.flash_attention_gradients(*inputs, **options)[:3]
    gradients = torch.ops.megalm.attention_backward(*inputs, *_op_arguments(q_BTHE, k_BSGE, **options))
    return tuple(gradients)


def _checked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool:
    """Return whether the kernels serve these inputs. Raises ValueError for what neither they nor the reference do."""
    tensors = [options.get(name) for name in ("alibi_slopes", "cu_seqlens", "key_lengths")]
    documents = options.get("documents")
    _check(q, k, v, *tensors)
    _check_documents(q, k, documents, options.get("cu_seqlens"))
    _check_numbers(options.get("window"), options.get("softcap"), options.get("dropout", 0.0), options.get("seed"))
    return launch.fused(q, k, v, *tensors, *(documents or ()))


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


def _check(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, cu_seqlens: Tensor | None, key_lengths: Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention of {shapes}; give q [B, T, H, E], k and v [B, S, G, E]")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention of {shapes}: {q.shape[2]} query heads do not share {k.shape[2]} key heads evenly")
    if not 1 <= q.shape[3] <= WIDEST_HEAD:
        raise ValueError(f"attention of head size {q.shape[3]}; sizes from 1 to {WIDEST_HEAD} are supported")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of q in {q.dtype}, k in {k.dtype} and v in {v.dtype}; give all in one dtype")
    if slopes is not None and (slopes.shape != q.shape[2:3] or slopes.dtype != torch.float32):
        raise ValueError(f"alibi_slopes {tuple(slopes.shape)} in {slopes.dtype}; give fp32 [{q.shape[2]}], one a head")
    if key_lengths is not None and (key_lengths.shape != q.shape[:1] or key_lengths.dtype != torch.int32):
        raise ValueError(
            f"key_lengths {tuple(key_lengths.shape)} in {key_lengths.dtype}; give int32 [{q.shape[0]}], one a sample"
        )
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} in {cu_seqlens.dtype}; give int32 [documents + 1]")
        if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
            raise ValueError(f"cu_seqlens with {shapes}; documents lie in one row (B = 1) of T = S tokens")


def _check_documents(q: Tensor, k: Tensor, documents: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor | None) -> None:
    if documents is None:
        return
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens and documents both say which tokens are of one document; give one of them")
    shapes = tuple(tuple(numbers.shape) for numbers in documents)
    if shapes != (q.shape[1:2], k.shape[1:2]) or q.shape[0] != 1:
        raise ValueError(
            f"documents {shapes} for q {tuple(q.shape)} and k {tuple(k.shape)}; give the numbers of the queries, "
            "[T], and of the keys, [S], of one row (B = 1)"
        )


def _check_numbers(window: int | None, softcap: float | None, dropout: float, seed: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window} sees nothing; give the number of positions seen, 1 or more, or None")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap={softcap} is no bound; give a number above 0, or None for no cap")
    philox.threshold(dropout)
    if dropout > 0.0 and seed is None:
        raise ValueError(f"dropout={dropout} without a seed; give seed=, a Philox key from 0 to 2^64-1")


def _strided(x: Tensor) -> Tensor:
    """Return the tensor itself where kernels can read it in place: a head's numbers side by side, rows close enough."""
    return x if x.stride(-1) == 1 and x.stride(1) < _LONGEST_ROW_STRIDE else x.contiguous()


def _documents(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return for every token the first place of its document and that of the next (int32 [T])."""
    places = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, places, right=True).clamp_(1, cu_seqlens.shape[0] - 1)
    return cu_seqlens[document - 1], cu_seqlens[document]


def _alike(numbers: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every number where those of `others` that are equal to it begin and end (int32); both ascend."""
    numbers, others = numbers.contiguous(), others.contiguous()
    begin, end = (torch.searchsorted(others, numbers, right=right, out_int32=True) for right in (False, True))
    return begin, end


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
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
) -> dict[str, Any]:
    """Return what all three kernels take. Absent tensors are stood in for by q, which is then not read as such.

    `starts` and `ends` bound the keys of a query's document; `key_gradients` needs the queries of a key's.
    """
    (_, T, heads, features), (S, groups) = q.shape, k.shape[1:3]
    starts, ends = (q, q) if cu_seqlens is None else _documents(cu_seqlens, T)
    if query_documents is not None and key_documents is not None:
        starts, ends = _alike(query_documents, key_documents)
    first_sample, first_head, all_heads = origin
    first_query, first_key, rows, columns = within
    offset = first_query + columns - rows - first_key
    first = ((first_sample * all_heads + first_head) * rows + first_query) * columns + first_key
    log2e = math.log2(math.e)
    windowed = 0 < window < max(rows, columns)
    return {
        "q": q,
        "k": k,
        "v": v,
        "slopes": q if slopes is None else slopes.contiguous(),
        "starts": starts,
        "ends": ends,
        "key_lengths": q if key_lengths is None else key_lengths.contiguous(),
        **dict(zip(("q_b", "q_t", "q_h"), q.stride(), strict=False)),
        **dict(zip(("k_b", "k_s", "k_g"), k.stride(), strict=False)),
        **dict(zip(("v_b", "v_s", "v_g"), v.stride(), strict=False)),
        "T": T,
        "S": S,
        "offset": offset,
        "heads": heads,
        "group": heads // groups,
        "window": window if windowed else 0,
        "score_scale": scale / softcap if softcap else scale * log2e,
        "cap": softcap * log2e,
        "key": seed,
        "limit": philox.threshold(dropout),
        "base": launch.signed_key(first % 2**64),
        "all_heads": all_heads,
        "rows": rows,
        "columns": columns,
        "rescale": 1.0 / (1.0 - dropout),
        "CAUSAL": causal,
        "WINDOW": windowed,
        "DOCUMENTS": cu_seqlens is not None or query_documents is not None,
        "LENGTHS": key_lengths is not None,
        "SOFTCAP": softcap > 0.0,
        "ALIBI": slopes is not None,
        "DROPOUT": dropout > 0.0,
        "QUADS": columns % 4 == 0 and first_key % 4 == 0,
        "HEAD": features,
        "WIDTH": max(32, triton.next_power_of_2(features)),
        "PRECISION": "ieee",
    }


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
    arguments = _arguments(q, k, v, *masks, causal, window, scale, softcap, dropout, seed, origin, within)
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
    arguments = _arguments(q, k, v, *masks, causal, window, scale, softcap, dropout, seed, origin, within)
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
        arguments.update(zip(("starts", "ends"), _alike(key_documents, query_documents), strict=True))
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
