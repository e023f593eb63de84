"""Attention by blocks of tokens in plain torch, on every device: only what a block of queries may see is computed.

The keys of each block of queries are gathered, as many for all blocks of a chunk. A chunk is computed once more in the
backward pass, so that neither its gathered keys nor its scores are stored: memory and time grow with the keys that are
seen, not with the square of the tokens. A score, its mask and its dropout depend on the places of query and key alone.
Where blocks are seen in summary, their mean keys and values stand in front of the row's, as columns of the same matrix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalm.config.patterns import BlockPattern
from megalm.nn.masks import Documents, Drop
from megalm.nn.ops import dropout_keep, plain_attention

CHUNKS = 8
"""Of the blocks of a row, each with as many keys as its last block: more waste less, and gather gradients more often.

A chunk's gradient of the keys is added to that of the whole row, so their number must not grow with the row.
"""


@dataclass(frozen=True)
class _Chunk:
    """N blocks of Q queries and the K keys that each of them may see, by their places in the row.

    Places beyond the row's end are those of padding, those before its start of summaries (see `BlockPattern`).
    """

    queries_NQ: Tensor
    keys_NK: Tensor


@dataclass(frozen=True)
class _Scores:
    """What acts on scores and probabilities: the arguments of `Operations.flash_attention`."""

    drop: Drop | None
    softcap: float | None
    slopes_H: Tensor | None
    bias_HTS: Tensor | None
    documents: Documents | None
    return_lse: bool


def pattern_attention(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    pattern: BlockPattern,
    causal: bool,
    window: int | None = None,
    drop: Drop | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    documents: Documents | None = None,
    return_lse: bool = False,
) -> Any:
    """Return attention over what `pattern` leaves visible, as BTHE; with `return_lse` (out, lse_BHT).

    The other arguments are those of `Operations.flash_attention`. The last block may be short. A summary is at a
    distance from the mean place of its tokens; it belongs to no document and has no place in a table of distances.
    """
    assert causal and window is None, f"causal={causal}, window={window}"
    assert not pattern.summaries or (bias_HTS is None and documents is None), (
        "summaries are of no one place or document"
    )
    k_BSGE, v_BSGE = with_summaries(k_BTGE, pattern), with_summaries(v_BTGE, pattern)
    scores = _Scores(drop, softcap, slopes_H, bias_HTS, documents, return_lse)
    parts = []
    for chunk in _chunks(q_BTHE.shape[1], pattern, q_BTHE.device):
        arguments = (q_BTHE, k_BSGE, v_BSGE, chunk, pattern, scores)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*arguments))
    tokens = q_BTHE.shape[1]
    if not return_lse:
        return torch.cat(parts, dim=1)[:, :tokens]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1)[:, :tokens], torch.cat(lses, dim=2)[..., :tokens]


def with_summaries(x_BTGE: Tensor, pattern: BlockPattern) -> Tensor:
    """Return keys or values with the means of the whole blocks in front, the last block's first: BSGE, in x's dtype.

    Without summaries the same tensor. torch takes a mean in fp32 or wider and rounds it once.
    """
    if not pattern.summaries:
        return x_BTGE
    blocks = x_BTGE.shape[1] // pattern.block
    means_BCGE = x_BTGE[:, : blocks * pattern.block].unflatten(1, (blocks, pattern.block)).mean(dim=2)
    return torch.cat((means_BCGE.flip(1), x_BTGE), dim=1)


def mean_places(keys: Tensor, pattern: BlockPattern) -> Tensor:
    """Return where keys stand among the tokens: a token at its own place, a summary at the mean of its block's."""
    if not pattern.summaries:
        return keys
    return torch.where(keys < 0, (-1 - keys) * pattern.block + (pattern.block - 1) / 2, keys)


@functools.lru_cache(maxsize=4)
def _chunks(tokens: int, pattern: BlockPattern, device: torch.device) -> tuple[_Chunk, ...]:
    blocks = -(-tokens // pattern.block)
    each = -(-blocks // CHUNKS)
    chunks = []
    for first in range(0, blocks, each):
        lists = [pattern.live_keys(block) for block in range(first, min(first + each, blocks))]
        longest = max(map(len, lists))
        keys_NK = torch.tensor([places + [tokens] * (longest - len(places)) for places in lists], device=device)
        starts_N = torch.arange(first, first + len(lists), device=device) * pattern.block
        chunks.append(_Chunk(starts_N[:, None] + torch.arange(pattern.block, device=device), keys_NK))
    return tuple(chunks)


def _attend(
    q_BTHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, chunk: _Chunk, pattern: BlockPattern, scores: _Scores
) -> Any:
    """Return the results of a chunk's queries, BTHE, and their lse_BHT where it is asked for."""
    rows, tokens = q_BTHE.shape[:2]
    columns = k_BSGE.shape[1]
    queries_NQ1, keys_N1K = chunk.queries_NQ[:, :, None], chunk.keys_NK[:, None]
    seen_NQK = pattern.sees(queries_NQ1, keys_N1K) & (keys_N1K < tokens)
    queries_NQ, keys_NK = (places.clamp(max=tokens - 1) for places in (chunk.queries_NQ, chunk.keys_NK))
    columns_NK = keys_NK + (columns - tokens)
    q, k, v = (
        x[:, places.flatten()].unflatten(1, places.shape).flatten(0, 1)
        for x, places in ((q_BTHE, queries_NQ), (k_BSGE, columns_NK), (v_BSGE, columns_NK))
    )  # [B N, Q or K, H or G, E]
    seen_BNQK = seen_NQK.expand(rows, -1, -1, -1)
    if scores.documents is not None:
        numbers_BT = scores.documents.numbers_BT
        seen_BNQK = seen_BNQK & (numbers_BT[:, queries_NQ][..., None] == numbers_BT[:, keys_NK][:, :, None])
    seen = seen_BNQK.flatten(0, 1)
    dropout_scale = _dropout_scale(q_BTHE, columns, chunk, scores.drop)
    bias = _bias(chunk, pattern, scores, q_BTHE.dtype)
    if not scores.return_lse and dropout_scale is None and bias is None and scores.softcap is None:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=grouped).transpose(1, 2)
        return out.unflatten(0, (rows, -1)).flatten(1, 2)
    result = plain_attention(
        q,
        k,
        v,
        causal=False,
        softcap=scores.softcap,
        visible_BTS=seen,
        dropout_scale_BHTS=dropout_scale,
        bias_HTS=None if bias is None else bias.repeat(rows, 1, 1, 1),
        return_lse=scores.return_lse,
    )
    out, *lse = result if scores.return_lse else (result,)
    out_BTHE = out.unflatten(0, (rows, -1)).flatten(1, 2)
    return (out_BTHE, lse[0].unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)) if lse else out_BTHE


def _dropout_scale(q_BTHE: Tensor, columns: int, chunk: _Chunk, drop: Drop | None) -> Tensor | None:
    """Return the multipliers of a chunk's probabilities, [B N, H, Q, K]: those of the row's whole matrix there."""
    if drop is None:
        return None
    rows, tokens, heads, _ = q_BTHE.shape
    first_sample, first_head, all_heads = drop.origin
    samples_B = first_sample + torch.arange(rows, device=q_BTHE.device)
    heads_H = first_head + torch.arange(heads, device=q_BTHE.device)
    matrices_BH = samples_B[:, None] * all_heads + heads_H
    places_NQK = chunk.queries_NQ[:, :, None] * columns + chunk.keys_NK[:, None] + (columns - tokens)
    index_BNHQK = matrices_BH[:, None, :, None, None] * (tokens * columns) + places_NQK[:, None]
    kept = dropout_keep(drop.stream, drop.rate, index_BNHQK.flatten(0, 1))
    return kept.to(torch.promote_types(q_BTHE.dtype, torch.float32)) / (1.0 - drop.rate)


def _bias(chunk: _Chunk, pattern: BlockPattern, scores: _Scores, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to a chunk's scores, [N, H, Q, K], for the places of queries and keys."""
    queries_NQ1, keys_N1K = chunk.queries_NQ[:, :, None], chunk.keys_NK[:, None]
    bias = None
    if scores.slopes_H is not None:
        wide = torch.promote_types(dtype, torch.float32)
        distance_N1QK = (queries_NQ1 - mean_places(keys_N1K, pattern)).abs().to(wide)[:, None]
        bias = -scores.slopes_H.detach().to(wide)[:, None, None] * distance_N1QK
    if scores.bias_HTS is not None:
        last = scores.bias_HTS.shape[1] - 1
        table_NHQK = scores.bias_HTS[:, queries_NQ1.clamp(max=last), keys_N1K.clamp(0, last)].transpose(0, 1)
        bias = table_NHQK if bias is None else bias + table_NHQK
    return bias
