"""Which tokens see each other in the reference: one pair at a time, from the definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.config.model import ModelSection

DOCUMENT_START = 0
"""The token that begins a document."""


def visible(model: ModelSection, layer: int, tokens: Tensor, padding: Tensor | None) -> Tensor:
    """Return which key s query t sees, bool [rows,T,T], from the definition: one pair at a time.

    Where blocks are seen in summary, [rows,T,C+T]: the keys of `summarised`.
    """
    rows, length = tokens.shape
    windowed = model.window is not None and model.window_pattern[layer % len(model.window_pattern)] == "S"
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for row in range(rows):
        for t in range(length):
            for s in range(t + 1):
                near = not windowed or t - s < model.window  # type: ignore[operator]
                # A document begins with its start token: none lies between them, or at t itself.
                parted = model.document_mask and bool((tokens[row, s + 1 : t + 1] == DOCUMENT_START).any())
                near = near and (s == t or padding is None or not bool(padding[row, s]))
                seen[row, t, s] = near and not parted and (model.attention_pattern == "full" or strided(model, t, s))
    if model.attention_pattern != "hierarchical":
        return seen
    starts = [block * model.block_size for block in reversed(range(length // model.block_size))]
    # A block is seen in summary where it is over and none of its tokens is seen by itself.
    before = [[s + model.block_size <= t and not strided(model, t, s) for s in starts] for t in range(length)]
    return torch.cat((torch.tensor(before, dtype=torch.bool).expand(rows, -1, -1), seen), dim=-1)


def strided(model: ModelSection, t: int, s: int) -> bool:
    """Return whether token t sees s <= t under blocks with a stride. Source: Child et al. 2019, section 4.2."""
    back = 0
    while s < (t // model.block_size - back) * model.block_size:  # blocks from t's own down to that of s
        back += 1
    jumped = model.block_stride is not None and back % model.block_stride == 0
    return s < model.global_tokens or back <= model.local_blocks - 1 or jumped
