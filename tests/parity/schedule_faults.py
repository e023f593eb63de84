"""Planted faults in pipeline schedules: chunks, messages and weight gradients that go astray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from megalm.models import build
from megalm.pipeline_parallel import executor, weight_gradients
from megalm.pipeline_parallel.actions import Action, ActionKind, Placement
from megalm.pipeline_parallel.executor import PipelineExecutor
from megalm.pipeline_parallel.schedules import Interleaved
from megalm.pipeline_parallel.weight_gradients import Owed
from tests.parity.cases import RECOMPUTE, UNTIED, batch, schedule, zero
from tests.parity.faults import Mutant, Patches
from tests.parity.harness import Case

INTERLEAVED = schedule("interleaved", 2)


def weight_gradients_made_twice_for_a_microbatch() -> Patches:
    original = PipelineExecutor._pay

    def twice(self: Any, action: Action, owed: list[Owed]) -> bool:
        return original(self, action, [*owed, *owed] if action.microbatch == 1 else owed)

    yield mock.patch.object(PipelineExecutor, "_pay", twice)


def weight_gradients_dropped_for_a_microbatch() -> Patches:
    original = PipelineExecutor._pay

    def dropped(self: Any, action: Action, owed: list[Owed]) -> bool:
        return original(self, action, [] if action.microbatch == 1 else owed)

    yield mock.patch.object(PipelineExecutor, "_pay", dropped)


def _with_input(owed: Owed, x: Tensor) -> Owed:
    ((_, gradient),) = owed.pieces
    return replace(owed, pieces=((x, gradient),))


def weight_gradients_of_another_microbatch_s_inputs() -> Patches:
    original = executor.pay
    before: dict[int, Tensor] = {}

    def mixed(owed: list[Owed]) -> None:
        inputs = {place: one.pieces[0][0] for place, one in enumerate(owed)}
        swapped = [_with_input(one, before.get(place, inputs[place])) for place, one in enumerate(owed)]
        before.update(inputs)
        original(swapped)

    yield mock.patch.object(executor, "pay", mixed)


def biases_forgotten_where_weights_are_put_off() -> Patches:
    original = Owed.pay
    yield mock.patch.object(Owed, "pay", lambda self: original(replace(self, bias=None)))


def put_off_gradients_go_past_the_tensor_axis() -> Patches:
    original = weight_gradients._edge

    def leaf(parameter: Tensor | None) -> GradientEdge | None:
        edge = original(parameter)
        while edge is not None and edge.node.next_functions:
            edge = GradientEdge(*edge.node.next_functions[0])  # type: ignore[arg-type]
        return edge

    yield mock.patch.object(weight_gradients, "_edge", leaf)


def put_off_gradients_not_told_to_the_engine() -> Patches:
    original = PipelineExecutor._pay

    def untold(self: Any, action: Action, owed: list[Owed]) -> bool:
        original(self, action, owed)
        return False

    yield mock.patch.object(PipelineExecutor, "_pay", untold)


def recomputed_input_of_the_first_layer_for_all() -> Patches:
    original = weight_gradients._LaterWeights.backward

    def first(ctx: Any, gradient: Tensor) -> Any:
        result = original(ctx, gradient)
        inputs = [one.pieces[0][0] for one in ctx.owed]
        ctx.owed[-1] = _with_input(ctx.owed[-1], next(x for x in inputs if x.shape == inputs[-1].shape))
        return result

    yield mock.patch.object(weight_gradients._LaterWeights, "backward", staticmethod(first))


def chunks_of_a_stage_exchanged() -> Patches:
    original = build.stage_plan

    def exchanged(config: Any, stage: int) -> Any:
        plan = original(config, stage)
        return replace(plan, chunks=plan.chunks[::-1]) if stage == 1 else plan

    yield mock.patch.object(build, "stage_plan", exchanged)


def layers_of_a_fold_in_the_order_of_a_loop() -> Patches:
    original = build.partition_layers

    def looped(layers: int, placement: Placement, explicit: Any) -> list[range]:
        places = original(layers, placement, explicit)
        half = placement.stages
        return [*places[: half - 1], places[half], places[half - 1], *places[half + 1 :]]

    yield mock.patch.object(build, "partition_layers", looped)


def message_taken_for_that_of_the_other_chunk() -> Patches:
    def taken(self: Any, stage: int, microbatches: int, order: Any = Interleaved.order) -> Iterator[Action]:
        stream = list(order(self, stage, microbatches))
        if stage == 1:
            one, other = (stream.index(Action(ActionKind.FORWARD, *piece)) for piece in ((1, 0), (0, 1)))
            stream[one], stream[other] = stream[other], stream[one]
        return iter(stream)

    yield mock.patch.object(Interleaved, "order", taken)


def two_microbatches_of_a_chunk_exchanged_on_one_stage() -> Patches:
    def exchanged(self: Any, stage: int, microbatches: int, order: Any = Interleaved.order) -> Iterator[Action]:
        for action in order(self, stage, microbatches):
            swaps = stage == 1 and action.kind is ActionKind.FORWARD and action.chunk == 0 and action.microbatch < 2
            yield action._replace(microbatch=1 - action.microbatch) if swaps else action

    yield mock.patch.object(Interleaved, "order", exchanged)


def microbatches_behind_the_last_whole_round_left_out() -> Patches:
    whole = property(lambda self: self.microbatches // self.stages * self.stages)
    yield mock.patch.object(Interleaved, "whole_rounds", whole)


def gradient_of_the_fold_handed_on_twice_as_large() -> Patches:
    original = PipelineExecutor._handed_to

    def doubled(self: Any, action: Action) -> Tensor | None:
        handed = original(self, action)
        return handed if handed is None or action.kind is ActionKind.FORWARD else torch.mul(handed, 2.0)

    yield mock.patch.object(PipelineExecutor, "_handed_to", doubled)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(weight_gradients_made_twice_for_a_microbatch, Case(2, 1, 1, schedule("zb-h1"))),
    Mutant(weight_gradients_dropped_for_a_microbatch, Case(2, 1, 1, schedule("zb-v"))),
    Mutant(weight_gradients_of_another_microbatch_s_inputs, Case(2, 1, 1, schedule("zb-h2"))),
    Mutant(biases_forgotten_where_weights_are_put_off, Case(1, 1, 2, schedule("zb-h1"))),
    Mutant(put_off_gradients_go_past_the_tensor_axis, Case(1, 1, 2, {**schedule("zb-h1"), "model.kv_heads": 1})),
    Mutant(put_off_gradients_not_told_to_the_engine, Case(1, 2, 1, {**schedule("zb-v"), **zero(2)})),
    Mutant(recomputed_input_of_the_first_layer_for_all, Case(1, 1, 1, {**schedule("zb-h1"), **RECOMPUTE})),
    Mutant(chunks_of_a_stage_exchanged, Case(2, 1, 1, INTERLEAVED)),
    Mutant(layers_of_a_fold_in_the_order_of_a_loop, Case(2, 1, 1, {**schedule("dualpipe-v"), **UNTIED})),
    Mutant(message_taken_for_that_of_the_other_chunk, Case(2, 1, 1, INTERLEAVED)),
    Mutant(two_microbatches_of_a_chunk_exchanged_on_one_stage, Case(2, 1, 1, INTERLEAVED)),
    Mutant(microbatches_behind_the_last_whole_round_left_out, Case(2, 1, 1, {**INTERLEAVED, **batch(6, 2)})),
    Mutant(gradient_of_the_fold_handed_on_twice_as_large, Case(2, 1, 1, schedule("zb-v"))),
)
