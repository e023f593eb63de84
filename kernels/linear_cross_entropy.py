"""The output head's matrix product and the cross-entropy of its logits, which are never stored as a whole.

    logits = hidden weight^T      losses, dlogits: see `cross_entropy`      dhidden = dlogits weight
                                                                            dweight = dlogits^T hidden

Both passes go through the vocabulary block by block in one buffer of at most 1/16 of the logits (or 1024 columns).
Forward: a block's logits are computed by torch's matrix product, rounded to the input's dtype as unfused logits are,
and their statistics merged in fp32. The logsumexp of a row is all that is kept. Backward: a block's logits are computed
again and overwritten by their gradient; dweight's rows of the block are one product over all rows of hidden at once,
and dhidden is summed over the blocks in fp32.

This is one product more than it takes to compute the gradients in the forward pass and keep them (Liger-Kernel, Hsu
et al. 2024). For it, losses may have any gradient, not one that is known beforehand; every sum over rows or columns is
taken in fp32 and rounded once; and no dweight is kept from the forward pass to the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megalm.kernels import launch, reference
from megalm.kernels.cross_entropy import check_columns, check_rows, settle
from megalm.kernels.cross_entropy_kernels import launch_gradient, launch_statistics


def block_columns(columns: int) -> int:
    """Return how many columns' logits are held at once: the largest multiple of 128 in 1/16, at least 1024."""
    return min(columns, max(1024, columns // 16 // 128 * 128))


def _blocks(hidden: Tensor, weight: Tensor, columns: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first column, the weight's rows, the logits) of each block; all logits lie in one buffer."""
    block = block_columns(columns)
    buffer = hidden.new_empty(hidden.shape[0], -(-block // 128) * 128)  # rows begin at borders of 16 bytes
    for first in range(0, columns, block or 1):
        weight_block = weight[first : min(first + block, columns)]
        logits = buffer[:, : weight_block.shape[0]]
        torch.mm(hidden, weight_block.t(), out=logits)
        yield first, weight_block, logits


def _statistics(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int) -> Tensor:
    statistics_4N = torch.zeros((4, hidden.shape[0]), dtype=torch.float32, device=hidden.device)
    statistics_4N[0] = float("-inf")
    for first, _, logits in _blocks(hidden, weight, columns):
        launch_statistics(logits, targets, statistics_4N, logits.shape[1], first)
    return statistics_4N


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product a b to `total`, which is fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # a CPU and ROCm have no product of bf16 or fp16 with an fp32 result
        total += torch.mm(a, b)


@torch.library.custom_op("megalm::linear_cross_entropy_statistics", mutates_args=())
def _statistics_op(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int) -> Tensor:
    return _statistics(hidden, weight, targets, columns)


@_statistics_op.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int) -> Tensor:
    return hidden.new_empty((4, hidden.shape[0]), dtype=torch.float32)


@torch.library.custom_op("megalm::linear_cross_entropy_gradients", mutates_args=())
def _gradients_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    grad: Tensor,
    columns: int,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    total = torch.zeros(hidden.shape if need_hidden else (0,), dtype=torch.float32, device=hidden.device)
    d_weight = weight.new_empty(weight.shape if need_weight else (0,))
    d_weight[columns:] = 0.0
    smoothing = {"vocab": vocab, "label_smoothing": label_smoothing, "z_loss": z_loss}
    _add_blocks(total, d_weight, hidden, weight, columns, (targets, lse, lse_rest, grad), smoothing)
    return total.to(hidden.dtype), d_weight


def _add_blocks(
    total: Tensor,
    d_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    columns: int,
    rows: tuple[Tensor, ...],
    options: dict[str, Any],
) -> None:
    """Go over the blocks of the vocabulary. Their logits are freed at the return, before `total` is cast and copied."""
    for first, weight_block, logits in _blocks(hidden, weight, columns):
        launch_gradient(logits, *rows, columns=logits.shape[1], first_column=first, **options)
        if total.numel():
            _add_product(total, logits, weight_block)
        if d_weight.numel():
            torch.mm(logits.t(), hidden, out=d_weight[first : first + logits.shape[1]])


@_gradients_op.register_fake
def _(
    hidden, weight, targets, lse, lse_rest, grad, columns, vocab, label_smoothing, z_loss, need_hidden, need_weight
) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    return d_hidden, weight.new_empty(weight.shape if need_weight else (0,))


@torch.library.custom_op("megalm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = weight.shape[0]
    losses, lse, lse_rest = reference.cross_entropy_losses(
        *_statistics(hidden, weight, targets, vocab), vocab=vocab, label_smoothing=label_smoothing, z_loss=z_loss
    )
    return settle(losses, targets, vocab, ignore_index), lse, lse_rest


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, label_smoothing, z_loss) -> tuple[Tensor, Tensor, Tensor]:
    losses, lse, lse_rest = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, lse, lse_rest


def _setup(ctx, inputs, output):
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _backward(ctx, grad, _lse, _lse_rest):
    hidden, weight, targets, lse, lse_rest = ctx.saved_tensors
    ignore_index, label_smoothing, z_loss = ctx.options
    vocab = weight.shape[0]
    grad = settle(grad, targets, vocab, ignore_index)
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    d_hidden, d_weight = torch.ops.megalm.linear_cross_entropy_gradients(
        hidden, weight, targets, lse, lse_rest, grad, vocab, vocab, label_smoothing, z_loss, need_hidden, need_weight
    )
    return d_hidden if need_hidden else None, d_weight if need_weight else None, None, None, None, None


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> None:
    check_rows(hidden, targets, label_smoothing, z_loss, "hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        given = f"weight {weight.dtype} of shape {tuple(weight.shape)} for hidden {hidden.dtype} {tuple(hidden.shape)}"
        raise ValueError(f"linear cross-entropy with {given}; give [V, D] for [N, D], both of one dtype")


def linear_cross_entropy_statistics(
    hidden_ND: Tensor, weight_VtD: Tensor, local_targets_N: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `cross_entropy.cross_entropy_statistics` of the logits hidden weight^T of a vocabulary's shard.

    The weight's rows from `columns` on are padding and take no part. Not differentiable by autograd: the gradients
    are `linear_cross_entropy_gradients`. Raises ValueError for wrong shapes or dtypes.
    """
    _check(hidden_ND, weight_VtD, local_targets_N, 0.0, 0.0)
    check_columns(columns, weight_VtD.shape[0])
    if not launch.fused(hidden_ND, weight_VtD, local_targets_N):
        return reference.linear_cross_entropy_statistics(hidden_ND, weight_VtD, local_targets_N, columns)
    maxima, sums, target_logits, logit_sums = torch.ops.megalm.linear_cross_entropy_statistics(
        hidden_ND, weight_VtD, local_targets_N.contiguous(), columns
    )
    return maxima, sums, target_logits, logit_sums


def linear_cross_entropy_gradients(
    hidden_ND: Tensor,
    weight_VtD: Tensor,
    local_targets_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    *,
    columns: int,
    vocab: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    need_hidden: bool = True,
    need_weight: bool = True,
    lse_rest_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (dhidden_ND, dweight_VtD) of a vocabulary's shard, in the inputs' dtype; empty [0] where not needed.

    dhidden is this shard's part: the sum over all shards is the gradient. lse_N, lse_rest_N and grad_N are as in
    `cross_entropy.cross_entropy_gradient_`. Rows of dweight from `columns` on are 0. Call it without recording, as in a
    backward pass. Raises ValueError for wrong shapes or dtypes.
    """
    _check(hidden_ND, weight_VtD, local_targets_N, label_smoothing, z_loss)
    check_columns(columns, weight_VtD.shape[0])
    if not launch.fused(hidden_ND, weight_VtD, local_targets_N):
        return reference.linear_cross_entropy_gradients(
            hidden_ND,
            weight_VtD,
            local_targets_N,
            lse_N,
            grad_N,
            columns=columns,
            vocab=vocab,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            need_hidden=need_hidden,
            need_weight=need_weight,
            lse_rest_N=lse_rest_N,
        )
    lse_N = lse_N.float().contiguous()
    d_hidden, d_weight = torch.ops.megalm.linear_cross_entropy_gradients(
        hidden_ND,
        weight_VtD,
        local_targets_N.contiguous(),
        lse_N,
        torch.zeros_like(lse_N) if lse_rest_N is None else lse_rest_N.float().contiguous(),
        grad_N.float().contiguous(),
        columns,
        vocab,
        label_smoothing,
        z_loss,
        need_hidden,
        need_weight,
    )
    return d_hidden, d_weight


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the `cross_entropy.cross_entropy` losses_N of the logits hidden weight^T, which are not stored: fp32.

    hidden_ND and weight_VD have one dtype: fp32, bf16 or fp16 on a GPU (others take plain torch); targets_N int64.
    The backward pass computes the logits again, as the top of the file tells, and leaves the inputs as they are.
    Under ZeRO 3, call it within the forward pass of the module that owns the weight: a bare weight is not gathered.
    Raises ValueError for wrong shapes, dtypes or factors.
    """
    _check(hidden_ND, weight_VD, targets_N, label_smoothing, z_loss)
    if not launch.fused(hidden_ND, weight_VD, targets_N):
        return reference.linear_cross_entropy(
            hidden_ND,
            weight_VD,
            targets_N,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
    losses, _, _ = torch.ops.megalm.linear_cross_entropy(
        hidden_ND, weight_VD, targets_N.contiguous(), ignore_index, label_smoothing, z_loss
    )
    return losses
