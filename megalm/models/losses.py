"""The training loss: cross-entropy summed over the valid tokens of a microbatch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megalm.nn.ops import Operations
from megalm.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy


def token_loss_sum(
    logits_BTVt: Tensor,
    labels_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    vocab: int,
    group: dist.ProcessGroup,
    label_smoothing: float,
    z_loss: float = 0.0,
    operations: Operations,
) -> Tensor:
    """Return the sum of the losses of the tokens whose mask is true: a scalar in fp32 (fp64 for fp64 logits).

    A sum, not a mean: the trainer divides by the valid tokens of the *global* batch, so that neither
    microbatches nor data ranks with fewer valid tokens weigh more than they should.
    """
    losses_N = vocab_parallel_cross_entropy(
        logits_BTVt.flatten(0, 1),
        labels_BT.flatten(),
        vocab=vocab,
        group=group,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        operations=operations,
    )
    return valid_sum(losses_N, loss_mask_BT)


def valid_sum(losses_N: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Return the sum of the losses of the tokens whose mask is true."""
    return (losses_N * loss_mask_BT.flatten()).sum()
