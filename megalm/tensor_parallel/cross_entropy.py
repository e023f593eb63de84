"""Cross-entropy over a vocabulary that is split over the tensor axis: the whole row of logits exists on no rank.

loss = lse - (1 - s) * logit[label] - s / V * sum(logits) + z * lse^2 with the row's log-sum-exp lse, label smoothing s
(Szegedy et al. 2016, section 7), as torch.nn.functional.cross_entropy defines it, and z-loss z (Chowdhery et al. 2022,
section 5). Three numbers a row are summed over
the group in one all-reduce, after its maximum (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.distributed.collectives import all_reduce_max, all_reduce_sum
from megalm.nn.ops import Operations, cross_entropy_losses


def vocab_parallel_cross_entropy(
    logits_NVt: Tensor,
    labels_N: Tensor,
    *,
    vocab: int,
    group: dist.ProcessGroup,
    operations: Operations,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the loss of every row, losses_N, in fp32 (fp64 for fp64 logits); the same on every rank of `group`.

    logits_NVt: this rank's columns, of which those at or beyond `vocab` in the whole row are padding and take no
    part. labels_N (int64) are indices of the whole vocabulary. Every rank of `group` must call. The backward pass
    overwrites the logits, the largest tensor of a step, by their gradient: torch refuses a second backward pass.
    """
    extra = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return _VocabParallelCrossEntropy.apply(logits_NVt, labels_N, vocab, group, operations, extra)


def vocab_parallel_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VtD: Tensor,
    labels_N: Tensor,
    *,
    vocab: int,
    group: dist.ProcessGroup,
    operations: Operations,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the losses of the logits hidden_ND weight_VtD^T, which exist in blocks of the vocabulary only.

    As `vocab_parallel_cross_entropy` otherwise. The gradient of hidden_ND is this rank's part: who made it for all
    ranks sums it over `group`.
    """
    extra = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return _VocabParallelLinearCrossEntropy.apply(hidden_ND, weight_VtD, labels_N, vocab, group, operations, extra)


@dataclass(frozen=True)
class _Shard:
    """A rank's part of the vocabulary: `columns` of it are real, and labels outside of them are -1."""

    columns: int
    labels_N: Tensor

    @classmethod
    def of(cls, labels_N: Tensor, columns: int, vocab: int, group: dist.ProcessGroup) -> _Shard:
        first = group.rank() * columns
        real = max(0, min(columns, vocab - first))
        local_N = labels_N - first
        return cls(real, local_N.masked_fill((local_N < 0) | (local_N >= real), -1))


def _merged_losses(
    statistics: tuple[Tensor, ...], vocab: int, extra: dict[str, float], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses_N, lse_N, lse_rest_N) of whole rows from each rank's statistics of its columns."""
    own_top_N, sum_N, *rest = statistics
    top_N = all_reduce_max(own_top_N, group)
    totals = all_reduce_sum(torch.stack([sum_N * (own_top_N - top_N).exp(), *rest]), group)
    return cross_entropy_losses(top_N, *totals, vocab=vocab, **extra)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NVt: Tensor,
        labels_N: Tensor,
        vocab: int,
        group: dist.ProcessGroup,
        operations: Operations,
        extra: dict[str, float],
    ) -> Tensor:
        shard = _Shard.of(labels_N, logits_NVt.shape[1], vocab, group)
        statistics = operations.cross_entropy_statistics(logits_NVt, shard.labels_N, shard.columns)
        loss_N, *lse_N = _merged_losses(statistics, vocab, extra, group)
        ctx.save_for_backward(logits_NVt, shard.labels_N, *lse_N)
        ctx.operations, ctx.columns, ctx.vocab, ctx.extra = operations, shard.columns, vocab, extra
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NVt, local_N, lse_N, lse_rest_N = ctx.saved_tensors
        ctx.operations.cross_entropy_gradient_(
            logits_NVt,
            local_N,
            lse_N,
            grad_N,
            columns=ctx.columns,
            vocab=ctx.vocab,
            lse_rest_N=lse_rest_N,
            **ctx.extra,
        )
        return logits_NVt, None, None, None, None, None


class _VocabParallelLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VtD: Tensor,
        labels_N: Tensor,
        vocab: int,
        group: dist.ProcessGroup,
        operations: Operations,
        extra: dict[str, float],
    ) -> Tensor:
        shard = _Shard.of(labels_N, weight_VtD.shape[0], vocab, group)
        statistics = operations.linear_cross_entropy_statistics(hidden_ND, weight_VtD, shard.labels_N, shard.columns)
        loss_N, *lse_N = _merged_losses(statistics, vocab, extra, group)
        ctx.save_for_backward(hidden_ND, weight_VtD, shard.labels_N, *lse_N)
        ctx.operations, ctx.columns, ctx.vocab, ctx.extra = operations, shard.columns, vocab, extra
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VtD, local_N, lse_N, lse_rest_N = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = ctx.operations.linear_cross_entropy_gradients(
            hidden_ND,
            weight_VtD,
            local_N,
            lse_N,
            grad_N,
            columns=ctx.columns,
            vocab=ctx.vocab,
            need_hidden=need_hidden,
            need_weight=need_weight,
            lse_rest_N=lse_rest_N,
            **ctx.extra,
        )
        return d_hidden if need_hidden else None, d_weight if need_weight else None, None, None, None, None, None
