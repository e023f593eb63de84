"""Cross-entropy over a split vocabulary against torch's over the whole one: losses and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.nn.ops import REFERENCE
from megalm.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.shards import assert_close, part_of, random_whole
from tests.worker_pool import WorkerPool

VOCAB = 67


def own_columns(mesh: ParallelMesh, rows: int) -> ShardSpec:
    return ShardSpec.split("logits", (rows, VOCAB), 1, mesh.index("tensor"), mesh.size("tensor"))


def check_smoothing(mesh: ParallelMesh) -> None:
    """Every label of the vocabulary once; the padding columns hold what must not take part."""
    labels_N = torch.arange(VOCAB)
    spec = own_columns(mesh, VOCAB)
    for smoothing in (0.0, 0.1, 0.5):
        logits = (3.0 * random_whole("logits", (VOCAB, VOCAB))).requires_grad_()
        expected = F.cross_entropy(logits, labels_N, reduction="none", label_smoothing=smoothing)
        weights = random_whole("weights", (VOCAB,))
        (expected * weights).sum().backward()
        assert logits.grad is not None
        own = part_of(logits.detach(), spec)
        own[:, spec.length :] = 1e3
        own.requires_grad_()
        losses = vocab_parallel_cross_entropy(
            own, labels_N, vocab=VOCAB, group=mesh.group("tensor"), operations=REFERENCE, label_smoothing=smoothing
        )
        assert_close(losses, expected, "losses")
        (losses * weights).sum().backward()
        assert own.grad is not None
        assert_close(own.grad, part_of(logits.grad, spec), "gradient")


def check_large_logits(mesh: ParallelMesh) -> None:
    """Where exp() of the logits overflows, and where a whole rank is at -inf beside the others."""
    logits = torch.full((2, VOCAB), -2e4, dtype=torch.float64)
    logits[0, 1], logits[0, 66], logits[1, 40] = 1e4, 1e4, -1e4
    own = part_of(logits, own_columns(mesh, 2)).requires_grad_()
    losses = vocab_parallel_cross_entropy(
        own, torch.tensor([66, 40]), vocab=VOCAB, group=mesh.group("tensor"), operations=REFERENCE
    )
    assert_close(losses, torch.tensor([math.log(2.0), 0.0], dtype=torch.float64))
    losses.sum().backward()
    assert own.grad is not None and own.grad.isfinite().all()


def check_dtypes(mesh: ParallelMesh) -> None:
    labels = torch.tensor([3, 66])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        spec = own_columns(mesh, 2)
        logits = random_whole("logits", (2, VOCAB)).to(dtype)
        own = part_of(logits, spec).requires_grad_()
        losses = vocab_parallel_cross_entropy(
            own, labels, vocab=VOCAB, group=mesh.group("tensor"), operations=REFERENCE
        )
        assert losses.dtype is wide
        expected = F.cross_entropy(logits.double(), labels, reduction="none")
        assert_close(losses.double(), expected, limit=8 * torch.finfo(wide).eps)  # no rounding to bf16 in between
        losses.sum().backward()
        assert own.grad is not None and own.grad.dtype is dtype


def check_all(mesh: ParallelMesh) -> None:
    check_smoothing(mesh)
    check_large_logits(mesh)
    check_dtypes(mesh)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_losses_and_gradients_are_those_of_the_whole_row_and_padding_takes_no_part(
    pool: WorkerPool, tensor: int
) -> None:
    """With label smoothing and without, for every label, for logits beyond exp()'s range, in every dtype."""
    pool.run(check_all, layout=RankLayout(tensor=tensor))
