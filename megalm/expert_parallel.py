"""Tokens on their way to experts that other ranks hold, and back.

The ranks of the expert group have a contiguous share of the experts each, in the order of the ranks, and tokens of
their own. Rows leave grouped by expert and arrive grouped by sender; here they are put in the order of experts.
Source: Lepikhin et al. 2020 (GShard), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.collectives import exchange_rows


def count_choices(chosen_N: Tensor, experts: int) -> Tensor:
    """Return how many of the choices each expert is, int64 [experts]; number `experts` is none."""
    if chosen_N.is_meta:  # torch 2.13 has no bincount of shapes
        return chosen_N.new_empty(experts)
    return torch.bincount(chosen_N, minlength=experts + 1)[:experts]


def on_host(numbers: Tensor, even: Any) -> Any:
    """Return numbers of which shapes are made, after a wait for the device.

    The meta device has none. There they are `even`, those of a router that sends as many tokens to each expert.
    """
    return even if numbers.is_meta else numbers.tolist()


class Routes:
    """Where the `rows` rows of one layer and microbatch go: `counts_E` of them to each expert.

    Every rank of the group (None: one rank alone) must make it, and call `to_experts` and `back`, forward and backward.
    `held_E` says how many rows come to each of this rank's experts.
    """

    def __init__(self, counts_E: Tensor, rows: int, group: dist.ProcessGroup | None) -> None:
        self.held_E = counts_E
        self.group = None if group is None or group.size() == 1 else group
        if group is None or self.group is None:
            return
        ranks = group.size()
        sent_RE = counts_E.view(ranks, -1)
        came_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(came_RE, sent_RE.contiguous(), group=group)
        # One wait for the device: the sizes of messages must be known on the host.
        shares = [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
        even = [shares, [shares[group.rank()]] * ranks]
        self.sent, self.came = on_host(torch.stack((sent_RE.sum(dim=1), came_RE.sum(dim=1))), even)
        self.held_E = came_RE.sum(dim=0)
        experts = torch.arange(sent_RE.shape[1], device=counts_E.device).repeat(ranks)
        of_rows = experts.repeat_interleave(came_RE.flatten(), output_size=sum(self.came))
        self._order = of_rows.argsort(stable=True)

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
