"""The token embedding and the output head, their rows (one a token of the vocabulary) split over the tensor axis."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.distributed.collectives import (
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
)
from megalm.distributed.sharding import ShardSpec
from megalm.nn.ops import Operations
from megalm.tensor_parallel.cross_entropy import vocab_parallel_linear_cross_entropy
from megalm.tensor_parallel.initialize import Initializer


def vocab_weight(
    name: str, vocab: int, hidden: int, *, group: dist.ProcessGroup, init: Initializer, std: float
) -> nn.Parameter:
    """Return this rank's rows of the logical tensor `name`.weight [vocab, hidden], zero beyond the vocabulary."""
    index, count = group.rank(), group.size()
    return init.table(ShardSpec.split(f"{name}.weight", (vocab, hidden), 0, index, count), std)


class VocabParallelEmbedding(nn.Module):
    """Look tokens up in a table whose rows are split over the tensor axis (Shoeybi et al. 2019, section 3).

    tokens_BT (int64) -> x_BTD (x_BTtD with `sequence`). A rank looks up its own rows, gives zero for the others',
    and the results are summed over `group`: every rank of it must call. Rows that pad the vocabulary are zero and
    get no gradient. The same weight serves as the output projection where embeddings are tied.
    """

    def __init__(
        self,
        name: str,
        vocab: int,
        hidden: int,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        std: float,
        operations: Operations,
        sequence: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.lookup = operations.embedding
        self.sequence = sequence
        self.weight = vocab_weight(name, vocab, hidden, group=group, init=init, std=std)
        self.rows = self.weight.shape[0]
        self.first_row = group.rank() * self.rows

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the rows of the tokens."""
        if self.group.size() == 1:
            return self.lookup(tokens_BT, self.weight)
        local_BT = tokens_BT - self.first_row
        foreign_BT = (local_BT < 0) | (local_BT >= self.rows)
        x = self.lookup(local_BT.masked_fill(foreign_BT, 0), self.weight)
        x = x.masked_fill(foreign_BT[..., None], 0.0)
        if self.sequence:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_group(x, self.group)


class VocabParallelHead(nn.Module):
    """Project hidden states on the vocabulary: x_BTD (x_BTtD with `sequence`) -> logits_BTVt, this rank's columns.

    `weight` is from `vocab_weight`; a tied head is given the embedding's own parameter. It is a module of its own,
    so that whatever gathers a module's parameters before its forward pass (ZeRO 3) sees the head too. The backward
    pass sums dx over `group`: every rank of it must call.

    Given labels it returns losses_N in the logits' place, which are then never stored as a whole.
    """

    def __init__(self, weight: nn.Parameter, *, group: dist.ProcessGroup, sequence: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.sequence = sequence

    def forward(self, x: Tensor, labels_N: Tensor | None = None, **loss: Any) -> Tensor:
        """Return the logits of this rank's part of the vocabulary, padding columns included.

        With labels_N: the losses of `vocab_parallel_linear_cross_entropy`, which takes `loss`.
        """
        x = gather_sequence(x, self.group) if self.sequence else copy_to_group(x, self.group)
        if labels_N is None:
            return F.linear(x, self.weight)
        return vocab_parallel_linear_cross_entropy(x.flatten(0, 1), self.weight, labels_N, group=self.group, **loss)
