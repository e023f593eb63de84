"""A model that predicts further tokens: what its loss depends on, who holds the embedding, what never sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.models.build import build_stage
from megalm.models.transformer import Transformer
from tests.parity.harness import VOCAB, Case
from tests.worker_pool import WorkerPool

AHEAD: dict[str, Any] = {"model.mtp_depth": 2, "model.layers": 2, "model.init_std": 0.3}
TOKENS = 16


def build(mesh: ParallelMesh, **overrides: Any) -> Transformer:
    layout = mesh.layout
    return build_stage(Case(layout.pipeline, 1, layout.tensor, overrides).config(), VOCAB, mesh)


def batch() -> tuple[Tensor, Tensor]:
    row = torch.randint(VOCAB, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    return row[:, :-1], row[:, 1:]


def check_sight(mesh: ParallelMesh) -> None:
    """The losses of one label are made of the tokens before it, and of all of them that a depth is given."""
    model, (tokens, labels) = build(mesh, **AHEAD), batch()
    for place in (1, 2, 9, TOKENS - 1):
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, place] = True
        with torch.no_grad():
            loss = model(tokens, labels, mask)
            later = tokens.clone()
            later[:, place + 1 :] = (later[:, place + 1 :] + 1) % VOCAB
            other = labels.where(mask, (labels + 1) % VOCAB)
            assert torch.equal(model(later, other, mask), loss), place
            model.mtp_weight = 0.0
            alone = model(tokens, labels, mask)
            model.mtp_weight = 0.3
        assert not torch.equal(alone, loss), place
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True  # no token before the first predicts its label from further away
    with torch.no_grad():
        assert float(model(tokens, labels, mask)) == float(_alone(model, tokens, labels, mask))


def _alone(model: Transformer, *arguments: Tensor) -> Tensor:
    model.mtp_weight = 0.0
    try:
        return model(*arguments)
    finally:
        model.mtp_weight = 0.3


def check_unused(mesh: ParallelMesh) -> None:
    """Logits, and the plain loss, are those of the same model without the blocks of further tokens."""
    tokens, labels = batch()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with_blocks, without = build(mesh, **AHEAD), build(mesh, **{**AHEAD, "model.mtp_depth": 0})
    with torch.no_grad():
        assert torch.equal(with_blocks(tokens), without(tokens))
        assert torch.equal(_alone(with_blocks, tokens, labels, mask), without(tokens, labels, mask))


def check_one_rank(mesh: ParallelMesh) -> None:
    check_sight(mesh)
    check_unused(mesh)


def test_a_loss_depends_on_earlier_tokens_alone_and_logits_not_on_the_blocks_of_further_ones(pool: WorkerPool) -> None:
    pool.run(check_one_rank, layout=RankLayout())


def test_the_stage_of_the_loss_holds_a_copy_of_the_embedding_tied_or_not() -> None:
    layout = RankLayout(pipeline=3)
    for tied in (True, False):
        values = {**AHEAD, "model.layers": 3, "model.tie_embeddings": tied}
        first, middle, last = (build(ParallelMesh.on_meta(layout, rank), **values) for rank in range(3))
        assert first.tied_weight is first.embedding.weight and last.tied_weight is last.embedding.weight
        assert middle.tied_weight is None and not middle.has_embedding and not middle.joins
        assert (last.head.weight is last.embedding.weight) == tied
        assert list(last.blocks) == ["2", "3", "4"] and list(last.joins) == ["3", "4"] and not first.joins
    folded = {**AHEAD, "model.layers": 4, "parallel.schedule": "zb-v", "model.tie_embeddings": False}
    first, second = (build(ParallelMesh.on_meta(RankLayout(pipeline=2), rank), **folded) for rank in range(2))
    assert list(first.joins) == ["4", "5"] and first.tied_weight is second.tied_weight is None
