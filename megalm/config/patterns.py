"""Which keys a query sees where attention goes by blocks of tokens. Imports no torch, though tensors do as places."""

from __future__ import annotations

from typing import Any, NamedTuple


class BlockPattern(NamedTuple):
    """Causal attention by blocks of `block` tokens.

    A query sees the last `local` blocks, its own included; with `stride` also each stride-th block before its own
    (Child et al. 2019, the strided pattern, of blocks); and the first `first` tokens (the global tokens of Beltagy et
    al. 2020 and Zaheer et al. 2020, here causal).
    """

    block: int
    local: int = 1
    stride: int | None = None
    first: int = 0

    def sees(self, query: Any, key: Any) -> Any:
        """Return whether the token at place `query` sees that at `key`; integers, or tensors that broadcast."""
        back = query // self.block - key // self.block
        near = (back < self.local) | (key < self.first)
        if self.stride is not None:
            near = near | (back % self.stride == 0)
        return near & (key <= query)

    def live_keys(self, query_block: int) -> list[int]:
        """Return the places of the tokens that the last token of a block of queries sees."""
        size = self.block
        last = query_block * size + size - 1
        whole = [block for block in range(query_block + 1) if self.sees(last, block * size + size - 1)]
        parted = range(self.first // size * size, min(self.first, last + 1))
        rest = [] if self.first // size in whole else list(parted)
        return rest + [place for block in whole for place in range(block * size, block * size + size)]
