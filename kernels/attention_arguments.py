"""What the kernels of `attention` are given: tensors, numbers and masks, checked and in the kernels' words."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from megalm.kernels import launch, philox

WIDEST_HEAD = 256


def checked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool:
    """Return whether the kernels serve these inputs. Raises ValueError for what neither they nor the reference do."""
    tensors = [options.get(name) for name in ("alibi_slopes", "cu_seqlens", "key_lengths")]
    documents = options.get("documents")
    _check(q, k, v, *tensors)
    _check_documents(q, k, documents, options.get("cu_seqlens"))
    _check_numbers(options.get("window"), options.get("softcap"), options.get("dropout", 0.0), options.get("seed"))
    return launch.fused(q, k, v, *tensors, *(documents or ()))


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


def kernel_arguments(
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
        starts, ends = alike(query_documents, key_documents)
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


def _documents(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return for every token the first place of its document and that of the next (int32 [T])."""
    places = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, places, right=True).clamp_(1, cu_seqlens.shape[0] - 1)
    return cu_seqlens[document - 1], cu_seqlens[document]


def alike(numbers: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every number where those of `others` that are equal to it begin and end (int32); both ascend."""
    numbers, others = numbers.contiguous(), others.contiguous()
    begin, end = (torch.searchsorted(others, numbers, right=right, out_int32=True) for right in (False, True))
    return begin, end
