"""How well a model predicts held-out text: loss per token, perplexity, bits per byte.

Owns the sums over microbatches and over the mesh, the same number under every layout. Cutting the held-out
file into rows is `data.loader`'s, running them through the stages the executor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megalm.data.loader import Batch, HeldOut, held_out_batches
from megalm.distributed.collectives import all_reduce_sum
from megalm.distributed.mesh import ParallelMesh
from megalm.models.transformer import Transformer
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor

_MICROBATCHES_AT_ONCE = 16


@dataclass(frozen=True)
class HeldOutLoss:
    """The prediction of `tokens` held-out tokens, which stand for `text_bytes` bytes of text."""

    total_nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.total_nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows. It depends on the tokenizer: compare only within one."""
        return math.exp(self.loss) if not self.loss > 700.0 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model spends on a byte of text in UTF-8; comparable between tokenizers.

        The cost of predicting ends of documents is included, though they are no bytes. NaN for a text of no
        bytes.
        """
        return self.total_nats / math.log(2.0) / self.text_bytes if self.text_bytes else math.nan

    def record(self, prefix: str = "evaluate/") -> dict[str, float]:
        """Return the entries of a line of metrics."""
        return {
            f"{prefix}loss": self.loss,
            f"{prefix}perplexity": self.perplexity,
            f"{prefix}bits_per_byte": self.bits_per_byte,
        }


def held_out_loss(
    executor: PipelineExecutor,
    model: Transformer,
    held_out: HeldOut,
    token_bytes_V: NDArray[np.int64],
    mesh: ParallelMesh,
    micro_batch: int,
) -> HeldOutLoss:
    """Return the loss on all windows of `held_out`, the same on every rank. Every rank of the mesh must call.

    `model` is the executor's module; no dropout, no label smoothing, no z-loss and no prediction of
    further tokens take part. `token_bytes_V` holds how
    many bytes of text each token stands for. Gradients are neither made nor touched.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    batches = held_out_batches(held_out, micro_batch, mesh.index("data"), mesh.size("data"))
    with _plain_likelihood(model):
        while chunk := list(islice(batches, _MICROBATCHES_AT_ONCE)):
            outputs = executor.forward_only([_microbatch(batch, mesh.device) for batch in chunk])
            if outputs:
                sums[0] += torch.stack(outputs).sum(dtype=torch.float64).cpu()
            for batch in chunk:
                labels = batch.labels_BT[batch.loss_mask_BT].numpy()
                if mesh.index("context") == 0:  # all ranks of a row have its labels
                    sums[1] += len(labels)
                    sums[2] += int(token_bytes_V[labels].sum())
    total_nats, tokens, text_bytes = _over_mesh(sums.to(mesh.device), mesh, executor.loss_stage).tolist()
    return HeldOutLoss(total_nats, int(tokens), int(text_bytes))


def _microbatch(batch: Batch, device: torch.device) -> Microbatch:
    return Microbatch(batch.tokens_BT.to(device), batch.labels_BT.to(device), batch.loss_mask_BT.to(device))


def _over_mesh(sums: torch.Tensor, mesh: ParallelMesh, loss_stage: int) -> torch.Tensor:
    """Return the loss stage's sums, added over data and context ranks, on every rank."""
    total = all_reduce_sum(sums, mesh.group("replica"))
    group, at = mesh.group("model"), mesh.coordinates
    if group.size() > 1:
        source = mesh.layout.rank(loss_stage, at.data, tensor=0, context=at.context)
        dist.broadcast(total, source, group=group)
    return total


@contextmanager
def _plain_likelihood(model: Transformer) -> Iterator[None]:
    """Make the model's loss the plain negative log-likelihood inside."""
    before = model.label_smoothing, model.z_loss, model.mtp_weight
    model.label_smoothing = model.z_loss = model.mtp_weight = 0.0
    try:
        yield
    finally:
        model.label_smoothing, model.z_loss, model.mtp_weight = before
