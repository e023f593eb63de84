"""What goes before and behind a block that predicts one token more ahead (DeepSeek-V3, 2024, section 2.2).

    h^k_i = norm(Block_k(M_k [norm(h^{k-1}_i); norm(Emb(t_{i+k}))]))        p_{i+k+1} = softmax(Head(h^k_i))

with h^0 what the model gives its head. Embedding and head are the model's own. The paper does not say that h^k is
normed; its published weights have that norm, and are used so.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelSection
from megalm.distributed.collectives import sum_gradient
from megalm.distributed.sharding import ShardSpec
from megalm.nn.norms import build_norm
from megalm.nn.ops import select_operations
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import Linear


class TokenJoin(Linear):
    """Join hidden states with the embeddings of later tokens, in front of block `index`: x_BTD, x_BTD -> x_BTD.

    Weight `project` [D, 2D], the hidden state's columns first, is whole on every tensor rank: with `sequence` (x_BTtD)
    a rank joins its own tokens, and the gradient is summed over `group`. `final_norm` stands behind the block, as the
    model's own in front of the head; the embedding is that of a table, without position and dropout.
    """

    def __init__(
        self, index: int, config: ModelSection, *, group: dist.ProcessGroup, init: Initializer, sequence: bool
    ) -> None:
        super().__init__()
        name = f"blocks.{index}.mtp"
        self.group = group if sequence else None
        operations = select_operations(config.kernels, init.device)

        def norm(which: str) -> nn.Module:
            return build_norm(f"{name}.{which}", config, group=self.group, init=init, operations=operations)

        self.hidden_norm, self.embedding_norm = norm("hidden_norm"), norm("embedding_norm")
        spec = ShardSpec.whole(f"{name}.project.weight", (config.hidden, 2 * config.hidden))
        self.project_weight = init.matrix(spec, config.matrix_std)
        # As the model's: with the norms behind the sums the block ends in one.
        self.final_norm = norm("final_norm") if config.norm_place != "post" else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Return what the block is given."""
        weight = self.project_weight if self.group is None else sum_gradient(self.project_weight, self.group)
        return self.linear(torch.cat((self.hidden_norm(x), self.embedding_norm(embedded)), dim=-1), weight)


def tokens_ahead(x_BT: Tensor, count: int) -> Tensor:
    """Return what belongs to the token `count` places later in its row, x_BT; zeros (False) where there is none."""
    return F.pad(x_BT[:, count:], (0, min(count, x_BT.shape[1])))
