"""A decoder-only Transformer, or the part of it that one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.distributed.places import Places, part, select, whole
from megalm.models.losses import token_loss_sum, valid_sum
from megalm.models.offload import Mover, Offload
from megalm.nn.block import TransformerBlock
from megalm.nn.context import Context
from megalm.nn.dropout import Dropout
from megalm.nn.masks import Documents, DropoutKeys, document_starts
from megalm.nn.moe import MixtureOfExperts
from megalm.nn.multi_token import TokenJoin, tokens_ahead
from megalm.nn.norms import build_norm
from megalm.nn.ops import REFERENCE, select_operations
from megalm.nn.positions import POSITIONS
from megalm.nn.router import Router
from megalm.tensor_parallel.embedding import VocabParallelEmbedding, VocabParallelHead, vocab_weight
from megalm.tensor_parallel.initialize import Initializer


@dataclass(frozen=True)
class StagePlan:
    """Which part of the model a pipeline stage holds: the layers of each of its chunks, and whether it has the ends."""

    chunks: tuple[range, ...]
    first: bool
    """The stage embeds, in its first chunk."""
    last: bool
    """The stage has the final norm and the head, in its last chunk."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers of all chunks, in ascending order."""
        return tuple(index for layers in self.chunks for index in layers)

    def embeds(self, chunk: int) -> bool:
        """Return whether a chunk takes tokens."""
        return self.first and chunk == 0

    def predicts(self, chunk: int) -> bool:
        """Return whether a chunk returns the loss."""
        return self.last and chunk == len(self.chunks) - 1


class Transformer(nn.Module):
    """The blocks of one stage, with the embedding before the first layer and the final norm and head behind the last.

    A stage may hold several runs of layers, its chunks, of which `forward` computes one.

    `group` is the tensor group, and the ranks of `expert_group` (None: one alone) divide the experts; every rank of
    both must call. With `sequence` the residual stream is split over the tensor ranks by tokens; `context` are the
    ranks that divide whole rows by tokens. Where embeddings are tied, or further tokens are predicted, and the first
    stage is not the last, both hold a copy of `embedding.weight`, `tied_weight`, and their gradients must be summed
    before the update. `mtp_weight` is that of the losses of further tokens, of all depths together. `document_start` is
    the token that begins a document, which `model.document_mask` needs. `offload` moves what the blocks keep for their
    backward pass to the host's memory and back. `on_built` is called with each part as soon as
    it is there, so that a model larger than one device can be divided while it is built.
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
        z_loss: float = 0.0,
        mtp_weight: float = 0.0,
        fused_head: bool = False,
        recompute: str = "none",
        recompute_every: int = 1,
        document_start: int | None = None,
        expert_group: dist.ProcessGroup | None = None,
        on_built: Callable[[nn.Module], None] | None = None,
        context: ContextParallel | None = None,
        offload: Mover | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.context = context
        self.vocab = vocab
        self.group = group
        self.sequence = sequence
        self.label_smoothing, self.z_loss, self.mtp_weight = label_smoothing, z_loss, mtp_weight
        self.fused_head = fused_head
        self.recompute, self.recompute_every = recompute, recompute_every
        self.tied, self.shares_embedding = config.tie_embeddings, config.tie_embeddings or config.mtp_depth > 0
        self.head_factor = 1.0 / config.width_factor
        self.embedding_scale, self.logit_softcap = config.embedding_scale, config.logit_softcap
        assert document_start is not None or not config.document_mask, "document_mask needs document_start"
        self.document_start = document_start if config.document_mask else None
        self.operations = select_operations(config.kernels, init.device)
        token_group = group if sequence else None
        self.position = POSITIONS.get(config.position)(config, embeds=plan.first, group=token_group, init=init)
        lasting = [value for value in vars(self.position).values() if isinstance(value, Tensor)]
        self.offload = None if offload is None else Offload(offload, lasting)
        self.ahead = range(config.layers, config.blocks) if plan.last else range(0)
        self.has_embedding = plan.first or len(self.ahead) > 0
        self.further_sums = torch.zeros(2, dtype=torch.float64, device=init.device)
        """Losses of further tokens, the mean of all depths, and tokens with a main loss, until someone takes them."""
        if self.has_embedding:
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

        norm = partial(build_norm, config=config, group=token_group, init=init, operations=self.operations)
        self.embedding_norm = norm("embedding_norm") if config.embedding_norm and plan.first else None
        self.blocks = nn.ModuleDict()
        share: dict[str, Any] = {"sequence": sequence, "context": context, "expert_group": expert_group}
        for index in (*plan.layers, *self.ahead):
            block = TransformerBlock(index, config, group=group, init=init, **share)
            block.recompute = block.attention.recompute = recompute == "selective" and index % recompute_every == 0
            if on_built is not None:
                on_built(block)
            self.blocks[str(index)] = block
        self.joins = nn.ModuleDict(
            {str(n): TokenJoin(n, config, group=group, init=init, sequence=sequence) for n in self.ahead}
        )
        if plan.last:
            # With the norms behind the sums the last block ends in one.
            self.final_norm = norm("final_norm") if config.norm_place != "post" else nn.Identity()
            self.head = VocabParallelHead(self._head_weight(config, init), group=group, sequence=sequence)
        if plan.first and plan.last and len(plan.chunks) > 1 and self.shares_embedding:
            self.embedding.weight.chunks = 2  # type: ignore[attr-defined]  # the first and the last
        if on_built is not None:
            on_built(self)

    def _head_weight(self, config: ModelSection, init: Initializer) -> nn.Parameter:
        """Return the embedding's own weight where the head is tied to it and both are here, else one for the head."""
        if self.tied and self.has_embedding:
            return self.embedding.weight
        name = "embedding" if self.tied else "head"
        return vocab_weight(name, self.vocab, config.hidden, group=self.group, init=init, std=config.init_std)

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of an embedding that another stage holds too, if it has one."""
        if not self.shares_embedding or self.plan.first == self.plan.last:
            return None
        return self.embedding.weight if self.has_embedding else self.head.weight

    @property
    def routers(self) -> dict[int, Router]:
        """The routers of this stage's mixtures of experts, by layer."""
        mixtures = {int(index): block.mlp for index, block in self.blocks.items()}
        return {index: mlp.router for index, mlp in mixtures.items() if isinstance(mlp, MixtureOfExperts)}

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        dropout: DropoutKeys | None = None,
        tokens_BT: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """Run one microbatch through one of this stage's chunks.

        The first of the model takes tokens_BT (int64) as x, later ones the hidden state x_BTD (x_BTtD with sequence
        parallelism) of the one before; a model with document masks, or that predicts further tokens, needs `tokens_BT`
        on these too. Tokens, labels and mask are whole rows, of whose hidden state a context rank has its own tokens.
        The last of the model returns the loss summed over this rank's valid tokens, or, without labels, this tensor
        rank's logits_BTVt (padding columns included); earlier ones the hidden state.
        """
        if self.offload is not None:
            self.offload.begin()
        embeds = self.plan.embeds(chunk)
        tokens_BT = x if embeds else tokens_BT
        own, context = self._context(x, dropout, tokens_BT, embeds, loss_mask_BT)
        if embeds:
            x = self._embed(select(x, own), context)
        for index in self.plan.chunks[chunk]:
            x = self._block(index, x, context)
        if not self.plan.predicts(chunk):
            return x
        x = self.final_norm(x)
        if labels_BT is None:
            return self._logits(self._scaled(x))
        assert loss_mask_BT is not None, "labels come with a loss mask"
        loss = self._loss_sum(x, select(labels_BT, own), select(loss_mask_BT, own))
        if self.ahead and self.mtp_weight:
            assert tokens_BT is not None, "further tokens are predicted from those before them"
            ahead = self._loss_sum_ahead(x, own, context, tokens_BT, labels_BT, loss_mask_BT)
            loss = loss + self.mtp_weight / len(self.ahead) * ahead
        return loss

    def _block(self, index: int, x: Tensor, context: Context) -> Tensor:
        block = self.blocks[str(index)]
        if not torch.is_grad_enabled():
            return block(x, context)
        compute = partial(block, x, context)
        if self.recompute == "full" and index % self.recompute_every == 0:
            compute = partial(checkpoint, block, x, context, use_reentrant=False, preserve_rng_state=False)
        return compute() if self.offload is None else self.offload.run(compute, block, x)

    def _loss_sum_ahead(
        self, x: Tensor, own: Places, context: Context, tokens_BT: Tensor, labels_BT: Tensor, loss_mask_BT: Tensor
    ) -> Tensor:
        """Return the losses of further tokens, summed over depths and tokens whose label is in the row and counts.

        A token that is given another than its own, as none of its row comes so late, is seen by no token with a loss.
        """
        losses = []
        for count, index in enumerate(self.ahead, start=1):
            join: Any = self.joins[str(index)]
            embedded = self.embedding(select(tokens_ahead(tokens_BT, count), own))
            later_labels_BT, later_mask_BT = (tokens_ahead(part_BT, count) for part_BT in (labels_BT, loss_mask_BT))
            context = replace(context, loss_mask_BT=later_mask_BT)
            x = join.final_norm(self._block(index, join(x, embedded), context))
            losses.append(self._loss_sum(x, select(later_labels_BT, own), select(later_mask_BT, own)))
        total = torch.stack(losses).sum()
        mean = total.detach().double() / len(self.ahead)
        self.further_sums += torch.stack((mean, select(loss_mask_BT, own).sum(dtype=torch.float64)))
        return total

    def _loss_sum(self, x: Tensor, labels_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
        x = self._scaled(x)
        loss: dict[str, Any] = {
            "vocab": self.vocab,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "operations": self.operations,
        }
        if self.fused_head:
            return valid_sum(self.head(x, labels_BT.flatten(), **loss), loss_mask_BT)
        return token_loss_sum(self._logits(x), labels_BT, loss_mask_BT, group=self.group, **loss)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.head_factor == 1.0 else x * self.head_factor

    def _context(
        self,
        x: Tensor,
        dropout: DropoutKeys | None,
        tokens_BT: Tensor | None,
        embeds: bool,
        loss_mask_BT: Tensor | None,
    ) -> tuple[Places, Context]:
        """Return the tokens of this context rank, and what the blocks are told."""
        ranks = self.group.size() if self.sequence else 1
        rows = 1 if self.context is None else self.context.group.size()
        tokens = x.shape[1] if embeds else x.shape[1] * ranks * rows
        own = queries = whole(tokens)
        if self.context is not None:
            own, queries = self.context.places(tokens), self.context.queries(tokens)
        length = tokens // rows // ranks
        held = part(own, self.group.rank() * length, length) if self.sequence else own
        documents = None
        if self.document_start is not None:
            assert tokens_BT is not None, "document masks are made of the tokens"
            numbers_BT = (tokens_BT == self.document_start).cumsum(dim=1)
            fused = self.operations is not REFERENCE and queries == whole(tokens)
            documents = Documents(numbers_BT, document_starts(numbers_BT) if fused else None)
        rotate = self.position.rotation(own)
        return own, Context(tokens, held, queries, rotate, dropout, documents, loss_mask_BT)

    def _embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        x = self.embedding(tokens_BT)
        x = x if self.embedding_scale == 1.0 else x * self.embedding_scale
        x = self.position(x, context.held)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        drop = self.embedding_dropout.on(context.dropout, context.held, context.tokens)
        return self.operations.dropout(x, drop=drop)

    def _logits(self, x: Tensor) -> Tensor:
        logits_BTVt: Tensor = self.head(x)
        cap = self.logit_softcap
        return logits_BTVt if cap is None else cap * torch.tanh(logits_BTVt / cap)
