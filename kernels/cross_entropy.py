"""Cross-entropy over rows of logits x of a vocabulary of V, at the level of one shard of it and of the whole.

    lse  = log sum_v exp(x_v)                       p = exp(x - lse)
    loss = (1 - s) (lse - x_target) + s (lse - mean_v(x)) + z lse^2
    dx   = dloss * ((1 + 2 z lse) p - (1 - s) [v = target] - s / V)

s: label smoothing (Szegedy et al. 2016, section 7). z: z-loss (Chowdhery et al. 2022, section 5).

The forward pass reads the logits once: each lane keeps a maximum and a sum of exponentials relative to it (Milakov and
Gimelshein 2018, algorithm 3). The backward pass reads them once more and overwrites them by their gradient, for they
are the largest tensor of a step. A shard's statistics merge with those of other shards: see `megalm.tensor_parallel`.
The kernels are in `cross_entropy_kernels`.
"""

import math

import torch
from torch import Tensor

from megalm.kernels import launch, reference
from megalm.kernels.cross_entropy_kernels import has_plain_rows, launch_gradient, launch_statistics


@torch.library.custom_op("megalm::cross_entropy_statistics", mutates_args=())
def _statistics_op(logits: Tensor, targets: Tensor, columns: int) -> Tensor:
    statistics_4N = torch.empty((4, logits.shape[0]), dtype=torch.float32, device=logits.device)
    launch_statistics(logits, targets, statistics_4N, columns)
    return statistics_4N


@_statistics_op.register_fake
def _(logits: Tensor, targets: Tensor, columns: int) -> Tensor:
    return logits.new_empty((4, logits.shape[0]), dtype=torch.float32)


@torch.library.custom_op("megalm::cross_entropy_gradient_", mutates_args=("logits",))
def _gradient_op_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    grad: Tensor,
    columns: int,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    launch_gradient(
        logits,
        targets,
        lse,
        lse_rest,
        grad,
        columns=columns,
        vocab=vocab,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


@_gradient_op_.register_fake
def _(logits, targets, lse, lse_rest, grad, columns, vocab, label_smoothing, z_loss) -> None:
    return None


@torch.library.custom_op("megalm::cross_entropy", mutates_args=())
def _cross_entropy_op(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = logits.shape[1]
    statistics_4N = torch.empty((4, logits.shape[0]), dtype=torch.float32, device=logits.device)
    launch_statistics(logits, targets, statistics_4N, vocab)
    losses, lse, lse_rest = reference.cross_entropy_losses(
        *statistics_4N, vocab=vocab, label_smoothing=label_smoothing, z_loss=z_loss
    )
    return settle(losses, targets, vocab, ignore_index), lse, lse_rest


@_cross_entropy_op.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    losses, lse, lse_rest = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, lse, lse_rest


def _setup(ctx, inputs, output):
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, *output[1:])


def _backward(ctx, grad, _lse, _lse_rest):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy has no second derivative (create_graph=True): its gradient replaces the logits"
        )
    logits, targets, lse, lse_rest = ctx.saved_tensors
    ignore_index, label_smoothing, z_loss = ctx.options
    vocab = logits.shape[1]
    grad = settle(grad, targets, vocab, ignore_index)
    torch.ops.megalm.cross_entropy_gradient_(
        logits, targets, lse, lse_rest, grad, vocab, vocab, label_smoothing, z_loss
    )
    return logits.detach(), None, None, None, None


_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def settle(values_N: Tensor, targets_N: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Return fp32 values of rows, 0 where the target is `ignore_index` and NaN where it is no index of the row."""
    wrong_N = (targets_N < 0) | (targets_N >= vocab)
    return values_N.float().masked_fill(wrong_N, math.nan).masked_fill(targets_N == ignore_index, 0.0)


def check_rows(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, name: str = "logits") -> None:
    """Raise ValueError unless these are [N, V] numbers and [N] int64 targets, with factors in their ranges."""
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or not logits.is_floating_point():
        shapes = f"{name} {logits.dtype} of shape {tuple(logits.shape)} with targets of shape {tuple(targets.shape)}"
        raise ValueError(f"cross-entropy of {shapes}; give floating-point rows [N, *] and targets [N]")
    if targets.dtype != torch.int64:
        raise ValueError(f"cross-entropy of {targets.dtype} targets; give int64")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is no share; use 0 or more and less than 1")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} is no coefficient; use 0 or more")


def check_columns(columns: int, width: int) -> None:
    """Raise ValueError unless there are that many columns."""
    if not 0 <= columns <= width:
        raise ValueError(f"columns={columns} of {width}; use 0 to {width}")


def cross_entropy_statistics(
    logits_NVt: Tensor, local_targets_N: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (max_N, sumexp_N, target_logit_N, logit_sum_N) over the first `columns` columns of a vocabulary's shard.

    All are fp32 (fp64 for fp64 logits); sumexp is the sum of exp(x - max). The target's logit is 0 where the local
    target (int64) is not in 0 .. columns - 1. No columns: max -inf, the others 0. Not differentiable by autograd: the
    gradient is `cross_entropy_gradient_`. `reference.cross_entropy_losses` turns merged statistics into losses.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_rows(logits_NVt, local_targets_N, 0.0, 0.0)
    check_columns(columns, logits_NVt.shape[1])
    if not launch.fused(logits_NVt, local_targets_N):
        return reference.cross_entropy_statistics(logits_NVt, local_targets_N, columns)
    rows = logits_NVt if has_plain_rows(logits_NVt) else logits_NVt.contiguous()
    maxima, sums, target_logits, logit_sums = torch.ops.megalm.cross_entropy_statistics(
        rows, local_targets_N.contiguous(), columns
    )
    return maxima, sums, target_logits, logit_sums


def cross_entropy_gradient_(
    logits_NVt: Tensor,
    local_targets_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    *,
    columns: int,
    vocab: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lse_rest_N: Tensor | None = None,
) -> None:
    """Overwrite the logits of a vocabulary's shard by grad * ((1 + 2 z lse) p - (1 - s) [v = target] - s / vocab).

    lse_N: the logsumexp over the whole vocabulary; `lse_rest_N` is what its rounding to fp32 lost, as
    `reference.cross_entropy_losses` returns it (without it, logits beyond some tens lose precision in fp32).
    grad_N: the losses' gradient. Columns from `columns` on (padding) and rows whose grad_N is 0 become exactly 0.
    Call it without recording, as in a backward pass. Raises ValueError for wrong shapes or dtypes, and for rows that
    are no runs of memory of their own.
    """
    check_rows(logits_NVt, local_targets_N, label_smoothing, z_loss)
    check_columns(columns, logits_NVt.shape[1])
    if not has_plain_rows(logits_NVt):
        strides = logits_NVt.stride()
        raise ValueError(f"logits of strides {strides} cannot be overwritten; give contiguous rows that do not overlap")
    if not launch.fused(logits_NVt, local_targets_N):
        reference.cross_entropy_gradient_(
            logits_NVt,
            local_targets_N,
            lse_N,
            grad_N,
            columns=columns,
            vocab=vocab,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            lse_rest_N=lse_rest_N,
        )
        return
    lse_N = lse_N.float().contiguous()
    lse_rest_N = torch.zeros_like(lse_N) if lse_rest_N is None else lse_rest_N.float().contiguous()
    grad_N = grad_N.float().contiguous()
    torch.ops.megalm.cross_entropy_gradient_(
        logits_NVt,
        local_targets_N.contiguous(),
        lse_N,
        lse_rest_N,
        grad_N,
        columns,
        vocab,
        label_smoothing,
        z_loss,
    )


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return losses_N in fp32 (fp64 for fp64 logits): the formula at the top of the file.

    logits_NV in fp32, bf16 or fp16 on a GPU (others take plain torch); targets_N int64. Rows whose target is
    `ignore_index` have loss and gradient 0. A target that is neither this nor an index of the row gives NaN.

    The backward pass writes the gradient over the logits' memory. Nobody else may need their values after it: torch
    raises "modified by an inplace operation" in another backward pass that does, this one's second included.
    Raises ValueError for wrong shapes, dtypes or factors.
    """
    check_rows(logits_NV, targets_N, label_smoothing, z_loss)
    if not launch.fused(logits_NV, targets_N):
        return reference.cross_entropy(
            logits_NV, targets_N, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
    rows = logits_NV if has_plain_rows(logits_NV) else logits_NV.contiguous()
    losses, _, _ = torch.ops.megalm.cross_entropy(rows, targets_N.contiguous(), ignore_index, label_smoothing, z_loss)
    return losses
