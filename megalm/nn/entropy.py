"""How spread the attention of a head is: its probabilities are computed once more, so that fused kernels stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.config.patterns import BlockPattern
from megalm.nn.masks import Documents
from megalm.nn.pattern_attention import mean_places, with_summaries

QUERIES = 256
"""Of a longer row so many queries are looked at, evenly spaced."""


@torch.no_grad()
def head_entropy(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    head: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    documents: Documents | None = None,
    pattern: BlockPattern | None = None,
    queries: int | None = None,
    **_: Any,
) -> Tensor:
    """Return the entropy, in nats, of a head's causal attention over the first row, the mean of its queries.

    Of its first `queries`, where the rest is padding.
    The arguments are those of `Operations.flash_attention`; what follows the softmax (dropout, sinks) does not count.
    A scalar in fp32, or wider where q is.
    """
    tokens, heads, size = q_BTHE.shape[1:]
    wide = torch.promote_types(q_BTHE.dtype, torch.float32)
    places_T = torch.arange(tokens, device=q_BTHE.device)
    seen = tokens if queries is None else max(queries, 1)
    places_Q = places_T[torch.linspace(0, seen - 1, min(seen, QUERIES), device=q_BTHE.device).round().long()]
    keys_BSGE = k_BTGE[:1] if pattern is None else with_summaries(k_BTGE[:1], pattern)
    places_S = torch.arange(tokens - keys_BSGE.shape[1], tokens, device=q_BTHE.device)
    k_SE = keys_BSGE[0, :, head * k_BTGE.shape[2] // heads].to(wide)
    scores_QS = q_BTHE[0, places_Q, head].to(wide) @ k_SE.T * size**-0.5
    if softcap is not None:
        scores_QS = softcap * torch.tanh(scores_QS / softcap)
    distance_QS = places_Q[:, None] - (places_S if pattern is None else mean_places(places_S, pattern))
    if slopes_H is not None:
        scores_QS = scores_QS - slopes_H[head] * distance_QS
    if bias_HTS is not None:
        scores_QS = scores_QS + bias_HTS[head, places_Q]
    hidden_QS = distance_QS < 0
    if window is not None:
        hidden_QS |= distance_QS >= window
    if pattern is not None:
        hidden_QS |= ~pattern.sees(places_Q[:, None], places_S)
    if documents is not None:
        numbers_T = documents.numbers_BT[0]
        hidden_QS |= numbers_T[places_Q][:, None] != numbers_T
    log_p_QS = scores_QS.masked_fill(hidden_QS, float("-inf")).log_softmax(-1)
    return torch.special.entr(log_p_QS.exp()).sum(-1).mean()
