"""All-to-all attention: ranks that hold some tokens of all heads change to all tokens of some heads, and back.

Whatever attention can do with whole rows it does here: any mask, pattern, bias or dropout. The heads of a tensor rank
must divide over the context ranks; keys and values of fewer heads are repeated until they do.
Source: Jacobs et al. 2023 (DeepSpeed Ulysses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megalm.distributed.collectives import exchange_blocks
from megalm.distributed.places import from_zigzag, to_zigzag
from megalm.nn.masks import Drop


def all_to_all_attention(
    attend: Callable[..., Any],
    group: dist.ProcessGroup,
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    drop: Drop | None = None,
    slopes_H: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Return what `attend` (an `Operations.flash_attention`) gives for whole rows, of this rank's tokens: BTHE.

    Tokens are those of `zigzag`; biases are of all heads of the tensor rank and of whole rows. Every rank of the
    context group must call, forward and backward.
    """
    count, heads = group.size(), q_BTHE.shape[2]
    own = heads // count
    first = group.rank() * own
    repeats = count // math.gcd(count, k_BTGE.shape[2])
    k_BTGE, v_BTGE = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k_BTGE, v_BTGE))
    biases = {"slopes_H": slopes_H, "bias_HTS": bias_HTS}
    options |= {name: bias[first : first + own] for name, bias in biases.items() if bias is not None}
    result = attend(
        *(to_heads(x, group) for x in (q_BTHE, k_BTGE, v_BTGE)),
        drop=None if drop is None else replace(drop, first=drop.first + first),
        return_lse=return_lse,
        **options,
    )
    if not return_lse:
        return to_tokens(result, group)
    out_BTHE, lse_BHT = result
    return to_tokens(out_BTHE, group), to_tokens(lse_BHT.transpose(1, 2), group).transpose(1, 2)


def to_heads(x_BTHX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all tokens, in their order, of this rank's share of the heads (dim 2), from some tokens of all heads."""
    blocks = x_BTHX.unflatten(2, (group.size(), -1)).movedim(2, 0)
    return from_zigzag(exchange_blocks(blocks, group))


def to_tokens(x_BTHX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's tokens of all heads from all tokens of its share of the heads; undoes `to_heads`."""
    return exchange_blocks(to_zigzag(x_BTHX, group.size()), group).movedim(0, 2).flatten(2, 3)
