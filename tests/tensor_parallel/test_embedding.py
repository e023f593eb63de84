"""Embedding and head with the vocabulary split over ranks against one table."""

from __future__ import annotations

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.nn.ops import REFERENCE
from megalm.tensor_parallel.embedding import VocabParallelEmbedding, VocabParallelHead, vocab_weight
from megalm.tensor_parallel.initialize import Initializer
from tests.shards import assert_close, assert_gradients_close, fill, part_of, random_whole
from tests.worker_pool import WorkerPool

INIT = Initializer(seed=1, dtype=torch.float64, device=torch.device("cpu"))
VOCAB, HIDDEN = 67, 6
TOKENS_BT = torch.cat((torch.arange(VOCAB), torch.tensor([0, 66, 33, 34, 16]))).view(3, 24)  # every token, some twice


def tokens_here(x: torch.Tensor, mesh: ParallelMesh, sequence: bool) -> torch.Tensor:
    return x.chunk(mesh.size("tensor"), dim=1)[mesh.index("tensor")] if sequence else x


def check_embedding(mesh: ParallelMesh) -> None:
    for sequence in (False, True):
        layer = VocabParallelEmbedding(
            "embedding",
            VOCAB,
            HIDDEN,
            group=mesh.group("tensor"),
            init=INIT,
            std=1.0,
            operations=REFERENCE,
            sequence=sequence,
        )
        wholes = fill(layer)
        expected = wholes["embedding.weight"][TOKENS_BT]
        dy = random_whole("dy", tuple(expected.shape))
        expected.backward(dy)
        y = layer(TOKENS_BT)
        y.backward(tokens_here(dy, mesh, sequence))
        assert_close(y, tokens_here(expected, mesh, sequence), "output")
        assert_gradients_close(layer, wholes)


def check_head(mesh: ParallelMesh) -> None:
    group = mesh.group("tensor")
    for sequence in (False, True):
        weight = vocab_weight("head", VOCAB, HIDDEN, group=group, init=INIT, std=1.0)
        head = VocabParallelHead(weight, group=group, sequence=sequence)
        assert head.weight is weight
        wholes = fill(head)
        x = random_whole("x", (2, 8, HIDDEN)).requires_grad_()
        logits = x @ wholes["head.weight"].T
        dy = random_whole("dy", tuple(logits.shape))
        logits.backward(dy)
        assert x.grad is not None
        columns = ShardSpec.split("logits", (2, 8, VOCAB), 2, mesh.index("tensor"), mesh.size("tensor"))
        own = tokens_here(x.detach(), mesh, sequence).clone().requires_grad_()
        y = head(own)
        assert_close(y, part_of(logits.detach(), columns), "logits")
        y.backward(part_of(dy, columns))
        assert own.grad is not None
        assert_close(own.grad, tokens_here(x.grad, mesh, sequence), "input gradient")
        assert_gradients_close(head, wholes)


def check_padding(mesh: ParallelMesh) -> tuple[int, int]:
    weight = vocab_weight("embedding", VOCAB, HIDDEN, group=mesh.group("tensor"), init=INIT, std=1.0)
    spec: ShardSpec = weight.shard  # type: ignore[attr-defined]
    assert not weight[spec.length :].any() and weight[: spec.length].all()
    return weight.shape[0], spec.length


def check_all(mesh: ParallelMesh) -> tuple[int, int]:
    check_embedding(mesh)
    check_head(mesh)
    return check_padding(mesh)


@pytest.mark.parametrize(("tensor", "rows"), [(1, [67]), (2, [34, 33]), (4, [17, 17, 17, 16])])
def test_embedding_and_head_match_one_table_and_rows_beyond_the_vocabulary_are_zero(
    pool: WorkerPool, tensor: int, rows: list[int]
) -> None:
    assert pool.run(check_all, layout=RankLayout(tensor=tensor)) == [(rows[0], length) for length in rows]
