"""Cross-entropy over logits whose vocabulary is split over the tensor axis; the whole row is never gathered.

    loss = logsumexp(z) - (1 - s) z_label - s * mean(z)      s: label smoothing, mean over the real vocabulary
    dz   = softmax(z) - (1 - s) [v = label] - s / V

Three all-reduces of one number a token: the maximum, then the sum of exponentials together with the label's logit
and the sum of logits (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.collectives import all_reduce_max, all_reduce_sum


def vocab_parallel_cross_entropy(
    logits_NVt: Tensor,
    labels_N: Tensor,
    *,
    vocab: int,
    group: dist.ProcessGroup,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of every row, losses_N, in fp32 (fp64 for fp64 logits); the same on every rank of `group`.

    logits_NVt: this rank's columns, of which those at or beyond `vocab` in the whole row are padding and take no
    part. labels_N (int64) are indices of the whole vocabulary. Every rank of `group` must call.
    """
    return _VocabParallelCrossEntropy.apply(logits_NVt, labels_N, vocab, group, label_smoothing)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NVt: Tensor,
        labels_N: Tensor,
        vocab: int,
        group: dist.ProcessGroup,
        smoothing: float,
    ) -> Tensor:
        columns = logits_NVt.shape[1]
        first = dist.get_rank(group) * columns
        real = max(0, min(columns, vocab - first))
        logits_NVt = logits_NVt.to(torch.promote_types(logits_NVt.dtype, torch.float32))
        if real < columns:
            logits_NVt = logits_NVt.clone()
            logits_NVt[:, real:] = float("-inf")
        top_N = all_reduce_max(logits_NVt.amax(dim=1), group)
        exponentials_NVt = (logits_NVt - top_N[:, None]).exp_()

        local_N = labels_N - first
        mine_N = (local_N >= 0) & (local_N < real)
        local_N = local_N.masked_fill(~mine_N, 0)
        label_logit_N = logits_NVt.gather(1, local_N[:, None])[:, 0].masked_fill(~mine_N, 0.0)
        sums = [exponentials_NVt.sum(dim=1), label_logit_N]
        if smoothing > 0.0:
            sums.append(logits_NVt[:, :real].sum(dim=1))
        totals = all_reduce_sum(torch.stack(sums), group)

        loss_N = totals[0].log() + top_N - (1.0 - smoothing) * totals[1]
        if smoothing > 0.0:
            loss_N -= (smoothing / vocab) * totals[2]
        ctx.save_for_backward(exponentials_NVt, totals[0], local_N, mine_N)
        ctx.real, ctx.vocab, ctx.smoothing = real, vocab, smoothing
        return loss_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        exponentials_NVt, sum_N, local_N, mine_N = ctx.saved_tensors
        # In place, for logits are the largest tensor of a step: a second backward pass is refused by torch's own check.
        grad_NVt = exponentials_NVt.mul_((grad_N / sum_N)[:, None])
        if ctx.smoothing > 0.0:
            grad_NVt[:, : ctx.real] -= (ctx.smoothing / ctx.vocab) * grad_N[:, None]
        at_label_N = (grad_N * (ctx.smoothing - 1.0)).masked_fill(~mine_N, 0.0)
        grad_NVt.scatter_add_(1, local_N[:, None], at_label_N[:, None])
        return grad_NVt, None, None, None, None
