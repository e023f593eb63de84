"""Tokens on their way to experts that other ranks hold, and back.

The ranks of the expert group have a contiguous share of the experts each, in the order of the ranks, and tokens of
their own. Rows leave grouped by expert and arrive grouped by sender; here they are put in the order of experts.
Source: Lepikhin et al. 2020 (GShard), section 3.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.collectives import exchange_rows


class Routes:
    """Where the rows of one layer and microbatch go: `counts_E` of this rank's go to each expert.

    Every rank of the group (None: one rank alone) must make it, and call `to_experts` and `back`, forward and backward.
    `held_E` says how many rows come to each of this rank's experts.
    """

    def __init__(self, counts_E: Tensor, group: dist.ProcessGroup | None) -> None:
        self.held_E = counts_E
        self.group = None if group is None or group.size() == 1 else group
        if group is None or self.group is None:
            return
        ranks = group.size()
        sent_RE = counts_E.view(ranks, -1)
        came_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(came_RE, sent_RE.contiguous(), group=group)
        # One wait for the device: the sizes of messages must be known on the host.
        self.sent, self.came = torch.stack((sent_RE.sum(dim=1), came_RE.sum(dim=1))).tolist()
        self.held_E = came_RE.sum(dim=0)
        experts = torch.arange(sent_RE.shape[1], device=counts_E.device).repeat(ranks)
        self._order = experts.repeat_interleave(came_RE.flatten()).argsort(stable=True)

    def to_experts(self, x_ND: Tensor) -> Tensor:
        """Return the rows for this rank's experts, grouped by them, of all ranks' rows, which are grouped by expert."""
        if self.group is None:
            return x_ND
        return exchange_rows(x_ND, self.sent, self.came, self.group)[self._order]

    def back(self, y_ND: Tensor) -> Tensor:
        """Return this rank's own rows, in the order in which they left, of the rows of all experts."""
        if self.group is None:
            return y_ND
        by_sender_ND = y_ND.new_zeros(y_ND.shape).index_copy(0, self._order, y_ND)
        return exchange_rows(by_sender_ND, self.came, self.sent, self.group)
