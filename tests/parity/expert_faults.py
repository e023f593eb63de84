"""Planted faults in mixtures of experts: what is routed, weighted, summed or sent wrongly where experts are divided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalm.distributed.collectives import exchange_rows
from megalm.expert_parallel import Routes
from megalm.nn import router
from megalm.nn.context import Context
from megalm.nn.moe import Experts
from megalm.nn.router import Router
from megalm.train import experts
from megalm.zero import replicated
from megalm.zero.replicated import ReplicatedEngine
from tests.parity.cases import BALANCED, EXPERTS, FULL, SEQUENCE
from tests.parity.faults import Mutant, Patches, _identity
from tests.parity.harness import Case

DIVIDED: dict[str, Any] = {"parallel.expert": 2}


def expert_gradients_summed_over_all_data_ranks() -> Patches:
    yield mock.patch.object(replicated, "replicas_of", lambda shard: "replica")


def dense_weights_counted_on_every_expert_rank() -> Patches:
    yield mock.patch.object(ReplicatedEngine, "_first_of_experts", lambda self, shard: True)


def router_losses_not_divided_by_the_tokens_of_the_batch() -> Patches:
    original = experts.ExpertBalance.begin
    yield mock.patch.object(
        experts.ExpertBalance, "begin", lambda self, scale: original(self, torch.ones_like(scale) / 16.0)
    )


def capacity_of_a_microbatch() -> Patches:
    original = router.within_capacity

    def together(chosen_BTk: Tensor, *rest: Any) -> Tensor:
        return original(chosen_BTk.flatten(0, 1)[None], *rest).view_as(chosen_BTk)

    yield mock.patch.object(router, "within_capacity", together)


def loads_balanced_over_a_microbatch() -> Patches:
    original = Router._with_losses

    def together(self: Any, *parts: Any) -> Tensor:
        *tensors, fits, context = parts
        joined = (None if x is None else x.flatten(0, 1)[None] for x in (*tensors, fits))
        mask_BT = context.loss_mask_BT
        gates = original(self, *joined, replace(context, loss_mask_BT=mask_BT.flatten()[None]))
        return gates.view_as(tensors[0])

    yield mock.patch.object(Router, "_with_losses", together)


def tokens_without_a_loss_balanced_too() -> Patches:
    original = Router._with_losses

    def all_of_them(self: Any, *parts: Any) -> Tensor:
        *tensors, context = parts
        return original(self, *tensors, replace(context, loss_mask_BT=torch.ones_like(context.loss_mask_BT)))

    yield mock.patch.object(Router, "_with_losses", all_of_them)


def gates_without_a_gradient() -> Patches:
    original = Experts.forward
    yield mock.patch.object(Experts, "forward", lambda self, x, gates, *rest: original(self, x, gates.detach(), *rest))


def gates_see_one_ranks_features_only() -> Patches:
    yield mock.patch.object(router, "copy_to_group", _identity)


def routers_see_one_ranks_tokens_only() -> Patches:
    yield mock.patch.object(router, "sum_gradient", _identity)


def loads_of_one_ranks_tokens_of_a_row() -> Patches:
    yield mock.patch.object(router, "reduce_from_group", _identity)


def biases_moved_by_one_ranks_loads() -> Patches:
    yield mock.patch.object(experts, "all_reduce_sum", _identity)


def biases_in_the_gates() -> Patches:
    original = Router.forward

    def forward(self: Any, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        gates, chosen = original(self, x, context)
        return gates + self.bias[chosen], chosen

    yield mock.patch.object(Router, "forward", forward)


def rows_come_back_in_the_order_of_the_experts() -> Patches:
    yield mock.patch.object(Routes, "back", lambda self, y: exchange_rows(y, self.came, self.sent, self.group))


MUTANTS: tuple[Mutant, ...] = (
    Mutant(expert_gradients_summed_over_all_data_ranks, Case(1, 2, 1, {**EXPERTS, **DIVIDED})),
    Mutant(dense_weights_counted_on_every_expert_rank, Case(1, 2, 1, {**EXPERTS, **DIVIDED})),
    Mutant(router_losses_not_divided_by_the_tokens_of_the_batch, Case(1, 1, 1, EXPERTS)),
    Mutant(capacity_of_a_microbatch, Case(1, 1, 1, FULL)),
    Mutant(loads_balanced_over_a_microbatch, Case(1, 1, 1, EXPERTS)),
    Mutant(tokens_without_a_loss_balanced_too, Case(1, 1, 1, EXPERTS)),
    Mutant(gates_without_a_gradient, Case(1, 1, 1, EXPERTS)),
    Mutant(gates_see_one_ranks_features_only, Case(1, 1, 2, EXPERTS)),
    Mutant(routers_see_one_ranks_tokens_only, Case(1, 1, 2, {**EXPERTS, **SEQUENCE})),
    Mutant(loads_of_one_ranks_tokens_of_a_row, Case(1, 1, 2, {**EXPERTS, **SEQUENCE})),
    Mutant(biases_moved_by_one_ranks_loads, Case(1, 2, 1, BALANCED), "sgd"),
    Mutant(biases_in_the_gates, Case(1, 1, 1, BALANCED)),
    Mutant(rows_come_back_in_the_order_of_the_experts, Case(1, 2, 1, {**EXPERTS, **DIVIDED})),
)
