"""Planted faults in inputs of linear layers that the backward pass makes again: of another's, or otherwise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from megalm.nn.norms import Norm
from megalm.tensor_parallel import linear, recomputation
from megalm.tensor_parallel.recomputation import Origin
from tests.parity.cases import DROPOUT, LATENT, SELECTIVE, SEQUENCE, schedule
from tests.parity.faults import Mutant, Patches
from tests.parity.harness import LLAMA, Case


def inputs_are_made_again_of_another_microbatch_s() -> Patches:
    original = recomputation._Remember.forward
    before: dict[int, Tensor] = {}
    number = 0

    def stale(ctx: Any, x: Tensor, source: Tensor) -> Tensor:
        nonlocal number
        number += 1
        place = number % 12  # of four blocks, each with inputs of qkv, up and down
        before[place], source = source, before.get(place, source)
        return original(ctx, x, source)

    yield mock.patch.object(recomputation._Remember, "forward", staticmethod(stale))


def inputs_are_gathered_again_out_of_order() -> Patches:
    original = linear.shared_input

    def shared(x: Tensor, origin: Origin | None, group: dist.ProcessGroup, sequence: bool) -> Any:
        x, origin = original(x, origin, group, sequence)
        return x, None if origin is None else origin.then(lambda made: made.roll(made.shape[1] // 2, 1))

    yield mock.patch.object(linear, "shared_input", shared)


def norms_are_left_out_where_inputs_are_made_again() -> Patches:
    yield mock.patch.object(Norm, "again", lambda self: lambda x: x.clone())


def what_is_made_again_is_its_storage_s_begin() -> Patches:
    original = recomputation._Saved.__init__

    def first(self: Any, *args: Any) -> None:
        original(self, *args)
        self.place = (*self.place[:2], 0)

    yield mock.patch.object(recomputation._Saved, "__init__", first)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(inputs_are_made_again_of_another_microbatch_s, Case(1, 1, 1, SELECTIVE)),
    Mutant(inputs_are_gathered_again_out_of_order, Case(2, 1, 2, {**SELECTIVE, **SEQUENCE, **DROPOUT})),
    Mutant(norms_are_left_out_where_inputs_are_made_again, Case(2, 1, 1, {**SELECTIVE, **LLAMA, **schedule("zb-h1")})),
    Mutant(what_is_made_again_is_its_storage_s_begin, Case(1, 1, 2, {**SELECTIVE, **LATENT, **SEQUENCE})),
)
