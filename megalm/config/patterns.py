"""Which keys a query sees where attention goes by blocks of tokens. Imports no torch, though tensors do as places."""

from __future__ import annotations

from typing import Any, NamedTuple


class BlockPattern(NamedTuple):
    """Causal attention by blocks of `block` tokens.

    A query sees the last `local` blocks, its own included; with `stride` also each stride-th block before its own
    (Child et al. 2019, the strided pattern, of blocks); and the first `first` tokens (the global tokens of Beltagy et
    al. 2020 and Zaheer et al. 2020, here causal). With `summaries` it sees each block before the local ones as one key
    and one value, the means of its tokens', at place -1 - b for block b: in front of the row, whatever its length. They
    stand under one softmax with the tokens, each for one. Source: the means of H-Transformer-1D (Zhu & Soricut 2021)
    and the compressed branch of Native Sparse Attention (Yuan et al. 2025), whose softmax is its own.
    """

    block: int
    local: int = 1
    stride: int | None = None
    first: int = 0
    summaries: bool = False

    def sees(self, query: Any, key: Any) -> Any:
        """Return whether the token at place `query` sees what is at `key`; integers, or tensors that broadcast."""
        back = query // self.block - key // self.block
        near = (back < self.local) | (key < self.first)
        if self.stride is not None:
            near = near | (back % self.stride == 0)
        seen = near & (key <= query)
        if not self.summaries:
            return seen
        before = query // self.block + 1 + key  # the query's block less the one that a summary at `key` is of
        return (key >= 0) & seen | (key < 0) & (before >= self.local)

    def hides_any(self, tokens: int) -> bool:
        """Return whether the last of so many tokens, whole blocks of them, misses any token before it."""
        last = tokens - 1
        return any(not self.sees(last, end) for end in range(self.block - 1, tokens, self.block))

    def live_keys(self, query_block: int) -> list[int]:
        """Return the places that the last token of a block of queries sees: summaries, then tokens."""
        size = self.block
        last = query_block * size + size - 1
        whole = [block for block in range(query_block + 1) if self.sees(last, block * size + size - 1)]
        parted = range(self.first // size * size, min(self.first, last + 1))
        rest = [] if self.first // size in whole else list(parted)
        summaries = range(-1, self.local - query_block - 2, -1) if self.summaries else ()
        return [*summaries, *rest] + [place for block in whole for place in range(block * size, block * size + size)]
