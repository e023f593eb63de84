"""Which tokens of a row a rank holds: runs of neighbouring ones, in the order in which they lie in its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Tokens `first` ... `first + length - 1` of a row."""

    first: int
    length: int


Places = tuple[Run, ...]
"""What a tensor's dim of tokens holds."""


def whole(tokens: int) -> Places:
    """Return all tokens of a row."""
    return (Run(0, tokens),)


def zigzag(tokens: int, index: int, count: int) -> Places:
    """Return rank `index`'s tokens of a row that `count` ranks divide so that causal attention is equal work for all.

    Of 2 * count pieces a rank has one that sees few keys and the one, as far from the end, that sees many; `tokens`
    are a multiple of 2 * count. Source: Zhu 2024 (zigzag ring attention), Megatron-LM's context parallelism likewise.
    """
    if count == 1:
        return whole(tokens)
    piece, rest = divmod(tokens, 2 * count)
    assert rest == 0, f"{tokens} tokens do not divide into {2 * count} pieces"
    return Run(index * piece, piece), Run((2 * count - 1 - index) * piece, piece)


def from_zigzag(parts_RBTX: Tensor) -> Tensor:
    """Return whole rows, BTX, from the tokens of all ranks R in their order: `zigzag`'s of rows that they divide."""
    early, late = parts_RBTX.unflatten(2, (2, -1)).unbind(2)  # each [R, B, piece, ...]
    return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)


def to_zigzag(rows_BTX: Tensor, ranks: int) -> Tensor:
    """Return each rank's tokens, RBTX, of whole rows; undoes `from_zigzag`."""
    early, late = rows_BTX.unflatten(1, (2, ranks, -1)).unbind(1)  # each [B, R, piece, ...]
    return torch.cat((early, late.flip(1)), dim=2).transpose(0, 1)


def part(places: Places, start: int, length: int) -> Places:
    """Return the places of elements start ... start + length - 1 of a tensor that holds `places`."""
    found, passed = [], 0
    for first, own in places:
        low, high = max(start, passed), min(start + length, passed + own)
        if low < high:
            found.append(Run(first + low - passed, high - low))
        passed += own
    return tuple(found)


def select(x: Tensor, places: Places, dim: int = 1) -> Tensor:
    """Return those tokens of whole rows, along `dim`: a view of x where they are one run."""
    found = [x.narrow(dim, *run) for run in places]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def pieces(x: Tensor, places: Places, dim: int = 1) -> Iterator[Tensor]:
    """Yield the runs of a tensor that holds `places` along `dim`, as views."""
    yield from x.split([length for _, length in places], dim)
