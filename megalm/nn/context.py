"""What the blocks of a stage are told of a microbatch beside its hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megalm.distributed.places import Places, whole
from megalm.nn.masks import Documents, DropoutKeys

Rotation = Callable[[Tensor], Tensor]
"""What is applied to queries and keys, BTHE -> BTHE."""


def unturned(x_BTHE: Tensor) -> Tensor:
    """Return queries or keys as they are."""
    return x_BTHE


@dataclass(frozen=True)
class Context:
    """Rows of `tokens` tokens, of whose residual stream this rank has those of `held` (): all).

    `queries` are the tokens whose scores attention computes here (): all). `rotate` turns queries and keys by their
    positions, `dropout` says which masks are drawn (None: evaluation), and `documents` which tokens may see each other
    (None: all of a row). `loss_mask_BT`, false for padding, is for who looks at blocks: what a token sees lies before
    it, so padding at a row's end needs no other mask. Documents and mask are of whole rows.
    """

    tokens: int
    held: Places = ()
    queries: Places = ()
    rotate: Rotation = unturned
    dropout: DropoutKeys | None = None
    documents: Documents | None = None
    loss_mask_BT: Tensor | None = None

    def __post_init__(self) -> None:
        """Fill in what is all tokens."""
        for name in ("held", "queries"):
            object.__setattr__(self, name, getattr(self, name) or whole(self.tokens))
