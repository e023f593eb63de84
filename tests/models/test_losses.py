"""The loss is a sum over valid tokens, whatever stands where the mask is false."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.models.losses import token_loss_sum
from megalm.nn.ops import REFERENCE
from tests.shards import assert_close, random_whole
from tests.worker_pool import WorkerPool

MASK_BT = torch.tensor([[True, False, True], [False, False, True]])
LABELS_BT = torch.tensor([[1, 4, 0], [2, 2, 3]])


def check_sum(mesh: ParallelMesh) -> None:
    for smoothing in (0.0, 0.1):
        options = {"vocab": 5, "group": mesh.group("tensor"), "label_smoothing": smoothing, "operations": REFERENCE}
        logits = random_whole("logits", (2, 3, 5)).requires_grad_()
        loss = token_loss_sum(logits.clone(), LABELS_BT, MASK_BT, **options)
        chosen = logits[MASK_BT], LABELS_BT[MASK_BT]
        assert_close(loss, F.cross_entropy(*chosen, reduction="sum", label_smoothing=smoothing))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient[~MASK_BT].any() and gradient[MASK_BT].all()
        nothing = token_loss_sum(logits.clone(), LABELS_BT, torch.zeros_like(MASK_BT), **options)
        assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, logits)[0].any()
        parts = [token_loss_sum(logits[i : i + 1], LABELS_BT[i : i + 1], MASK_BT[i : i + 1], **options) for i in (0, 1)]
        assert_close(parts[0] + parts[1], loss)
        narrow = token_loss_sum(logits.bfloat16(), LABELS_BT, MASK_BT, **options)
        assert narrow.dtype is torch.float32 and narrow.shape == () and loss.dtype is torch.float64


def test_the_loss_is_the_sum_over_valid_tokens_and_rows_add_up(pool: WorkerPool) -> None:
    pool.run(check_sum, layout=RankLayout())
