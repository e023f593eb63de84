"""A decoder-only Transformer, or the part of it that one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.config.run import ModelSection
from megalm.models.losses import token_loss_sum, valid_sum
from megalm.nn.block import TransformerBlock
from megalm.nn.dropout import Dropout, DropoutKeys
from megalm.nn.norms import NORMS
from megalm.nn.ops import select_operations
from megalm.nn.positions import POSITIONS
from megalm.tensor_parallel.embedding import VocabParallelEmbedding, VocabParallelHead, vocab_weight
from megalm.tensor_parallel.initialize import Initializer


@dataclass(frozen=True)
class StagePlan:
    """Which part of the model a pipeline stage holds."""

    layers: range
    first: bool
    last: bool


class Transformer(nn.Module):
    """The blocks of one stage, with the embedding on the first stage and the final norm and head on the last.

    `group` is the tensor group; every rank of it must call. With `sequence` the residual stream is split over its
    ranks by tokens. Where embeddings are tied and the first stage is not the last, both hold a copy of
    `embedding.weight`, `tied_weight`, and their gradients must be summed before the update. `on_built` is called
    with each part as soon as it is there, so that a model larger than one device can be divided while it is built.
    """

    def __init__(
        self,
        config: ModelSection,
        *,
        vocab: int,
        plan: StagePlan,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool = False,
        label_smoothing: float = 0.0,
        fused_head: bool = False,
        recompute: bool = False,
        on_built: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.vocab = vocab
        self.group = group
        self.sequence = sequence
        self.label_smoothing = label_smoothing
        self.fused_head = fused_head
        self.recompute = recompute
        self.tied = config.tie_embeddings
        self.operations = select_operations(config.kernels, init.device)
        token_group = group if sequence else None
        self.position = POSITIONS.get(config.position)(config, embeds=plan.first, group=token_group, init=init)
        if plan.first:
            self.embedding = VocabParallelEmbedding(
                "embedding",
                vocab,
                config.hidden,
                group=group,
                init=init,
                std=config.init_std,
                operations=self.operations,
                sequence=sequence,
            )
        self.embedding_dropout = Dropout("embedding", config.dropout)
        self.blocks = nn.ModuleDict()
        for index in plan.layers:
            block = TransformerBlock(index, config, group=group, init=init, sequence=sequence)
            if on_built is not None:
                on_built(block)
            self.blocks[str(index)] = block
        if plan.last:
            self.final_norm = NORMS.get(config.norm)(
                "final_norm",
                config.hidden,
                eps=config.norm_eps,
                bias=config.bias,
                group=token_group,
                init=init,
                operations=self.operations,
            )
            if config.tie_embeddings and plan.first:
                weight = self.embedding.weight
            else:
                name = "embedding" if config.tie_embeddings else "head"
                weight = vocab_weight(name, vocab, config.hidden, group=group, init=init, std=config.init_std)
            self.head = VocabParallelHead(weight, group=group, sequence=sequence)
        if on_built is not None:
            on_built(self)

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of an embedding that another stage holds too, if it has one."""
        if not self.tied or self.plan.first == self.plan.last:
            return None
        return self.embedding.weight if self.plan.first else self.head.weight

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """Run one microbatch through this stage.

        The first stage takes tokens_BT (int64), later ones the hidden state x_BTD (x_BTtD with sequence
        parallelism) of the stage before. The last stage returns the loss summed over valid tokens, or, without
        labels, this tensor rank's logits_BTVt (padding columns included); earlier ones the hidden state.
        """
        ranks = dist.get_world_size(self.group) if self.sequence else 1
        tokens = x.shape[1] if self.plan.first else x.shape[1] * ranks
        first_token = dist.get_rank(self.group) * (tokens // ranks) if self.sequence else 0
        if self.plan.first:
            x = self.position(self.embedding(x), first_token)
            x = self.operations.dropout(x, self.embedding_dropout.at(dropout, first_token, tokens))
        rotate = self.position.rotation(tokens)
        for block in self.blocks.values():
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, rotate, dropout, first_token, tokens, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, rotate, dropout, first_token, tokens)
        if not self.plan.last:
            return x
        x = self.final_norm(x)
        if labels_BT is None:
            return self.head(x)
        assert loss_mask_BT is not None, "labels come with a loss mask"
        loss: dict[str, Any] = {
            "vocab": self.vocab,
            "label_smoothing": self.label_smoothing,
            "operations": self.operations,
        }
        if self.fused_head:
            return valid_sum(self.head(x, labels_BT.flatten(), **loss), loss_mask_BT)
        return token_loss_sum(self.head(x), labels_BT, loss_mask_BT, group=self.group, **loss)
