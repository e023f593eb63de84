"""A mixture of experts in place of a block's MLP: a router, experts of which each token sees a few, shared ones.

Source: Shazeer et al. 2017; Fedus et al. 2022 (Switch, one expert a token); Dai et al. 2024 (shared experts).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.distributed.collectives import (
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
)
from megalm.distributed.sharding import ShardSpec
from megalm.expert_parallel import Routes, count_choices, on_host
from megalm.nn.context import Context
from megalm.nn.mlp import ACTIVATIONS, MLP, activate
from megalm.nn.ops import select_operations
from megalm.nn.router import Router, capacity
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.recomputation import Origin, made_again


class MixtureOfExperts(nn.Module):
    """sum over a token's experts of gate times expert(x), plus shared(x): x_BTD -> y_BTD (x_BTtD -> y_BTtD).

    The features of each expert are split over `group`, the tensor group, and the experts over `expert_group` (None:
    each rank has all). Every rank of both must call.
    """

    def __init__(
        self,
        name: str,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
        expert_group: dist.ProcessGroup | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        self.group, self.sequence = group, sequence
        self.router = Router(f"{name}.router", config, group=group, init=init, sequence=sequence, context=context)
        self.experts = Experts(f"{name}.experts", config, group=group, init=init, expert_group=expert_group)
        self.shared = None
        if config.shared_features:
            width = config.shared_features
            self.shared = MLP(f"{name}.shared", config, group=group, init=init, sequence=sequence, features=width)

    def forward(self, x: Tensor, context: Context, origin: Origin | None = None) -> Tensor:
        """Return the block's second contribution to the residual stream.

        With the `origin` of x the shared experts make x again in the backward pass, and all experts activations.
        The rows of routed experts, which travelled, are kept.
        """
        gates_BTk, chosen_BTk = self.router(x, context)
        x_BTD = gather_sequence(x, self.group) if self.sequence else copy_to_group(x, self.group)
        routed = gates_BTk.flatten(0, 1), chosen_BTk.flatten(0, 1)
        partial_ND = self.experts(x_BTD.flatten(0, 1), *routed, origin is not None)
        leave = reduce_scatter_sequence if self.sequence else reduce_from_group
        y: Tensor = leave(partial_ND.view_as(x_BTD), self.group)
        return y if self.shared is None else y + self.shared(x, origin)


class Experts(nn.Module):
    """MLPs without biases, [E, F, D] and [E, D, F] (with a gate [E, 2, F, D]), of which each token sees k.

    x_ND, gates_Nk, chosen_Nk (E: no expert) -> this tensor rank's part of the sum y_ND.
    """

    def __init__(
        self,
        name: str,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        expert_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        assert config.experts is not None
        self.count, self.expert_group = config.experts, expert_group
        self.drops, self.even_share = config.capacity_factor is not None, 1.0
        if config.capacity_factor is not None:  # of the choices, what fits where each expert has as many
            tokens, each = config.sequence, config.experts_per_token
            most = capacity(config.capacity_factor, tokens, each, self.count)
            self.even_share = min(1.0, most * self.count / (tokens * each))
        self.activation = ACTIVATIONS.get(config.activation)
        self.operations = select_operations(config.kernels, init.device)
        features, hidden, parts = config.expert_features, config.hidden, self.activation.parts
        leading = (self.count, parts) if parts > 1 else (self.count,)

        def held(which: str, shape: tuple[int, ...], dim: int) -> ShardSpec:
            spec = ShardSpec.split(f"{name}.{which}.weight", shape, dim, group.rank(), group.size())
            if expert_group is None:
                return spec
            return spec.of_experts(expert_group.rank(), expert_group.size())

        std, shrink = config.matrix_std, config.residual_shrink
        self.up = init.matrix(held("up", (*leading, features, hidden), len(leading)), std)
        self.down = init.matrix(held("down", (self.count, hidden, features), 2), std, shrink)

    def forward(self, x_ND: Tensor, gates_Nk: Tensor, chosen_Nk: Tensor, again: bool = False) -> Tensor:
        """Return the weighted sums; rows of no expert are zero. The backward pass may make activations `again`."""
        tokens, each = chosen_Nk.shape
        flat = chosen_Nk.flatten()
        order = flat.argsort(stable=True)
        counts_E = count_choices(flat, self.count)
        if self.drops:
            order = order[: on_host(counts_E.sum(), round(len(flat) * self.even_share))]
        rows: Tensor = _RowsOfChoices.apply(x_ND, order, each)
        routes = Routes(counts_E, len(rows), self.expert_group)
        y = routes.back(self._transformed(routes.to_experts(rows), routes.held_E, again))
        y_NkD = y.new_zeros(tokens * each, y.shape[-1]).index_copy(0, order, y).view(tokens, each, -1)
        return torch.bmm(gates_Nk.to(y.dtype).unsqueeze(1), y_NkD).squeeze(1)

    def _transformed(self, x_ND: Tensor, counts_E: Tensor, again: bool) -> Tensor:
        product = self.operations.grouped_matmul
        h, origin = activate(self.activation, self.operations, product(x_ND, self.up.flatten(1, -2), counts_E), again)
        with made_again(h, origin):
            return product(h, self.down, counts_E)


class _RowsOfChoices(torch.autograd.Function):
    """The row of the token of each choice; the gradients of a token's `each` choices are added in their order.

    Autograd's own adds them as they come on a GPU, so sums of three or more would differ from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, each: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.shape = (len(x_ND), each)
        return x_ND.index_select(0, order_R // each)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        tokens, each = ctx.shape
        by_choice = gradient_RD.new_zeros(tokens * each, gradient_RD.shape[-1]).index_copy_(0, order_R, gradient_RD)
        return by_choice.view(tokens, each, -1).sum(dim=1), None, None
