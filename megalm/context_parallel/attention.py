"""How a row is divided over the context axis, and how its tokens attend to each other there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.context_parallel.ring import ring_attention
from megalm.context_parallel.ulysses import all_to_all_attention
from megalm.distributed.places import Places, from_zigzag, whole, zigzag
from megalm.nn.ops import Operations


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that divide each row's tokens, and how they attend: "ring", or "ulysses" (all-to-all)."""

    group: dist.ProcessGroup
    attention: str = "ring"

    def places(self, tokens: int) -> Places:
        """Return which tokens of a row of so many this rank holds."""
        return zigzag(tokens, self.group.rank(), self.group.size())

    def queries(self, tokens: int) -> Places:
        """Return whose attention this rank computes: its own tokens', or that of all of them for some heads."""
        return self.places(tokens) if self.attention == "ring" else whole(tokens)

    def whole_rows(self, x_BTX: Tensor) -> Tensor:
        """Return the tokens of all ranks in their order, outside of autograd; every rank of the group must call."""
        ranks = self.group.size()
        if ranks == 1:
            return x_BTX
        parts = [torch.empty_like(x_BTX, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(parts, x_BTX.detach().contiguous(), group=self.group)
        return from_zigzag(torch.stack(parts))

    def around(self, attend: Callable[..., Any], operations: Operations) -> Callable[..., Any]:
        """Return attention of this rank's tokens, of which `attend` does whole rows."""
        if self.group.size() == 1:
            return attend
        if self.attention == "ring":
            return partial(ring_attention, operations, self.group)
        return partial(all_to_all_attention, attend, self.group)
