"""Planted faults in activations that wait in the host's memory: another's come back, or others of the same storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from torch import Tensor

from megalm.models import offload
from tests.offloading import ArrayMover
from tests.parity.cases import RECOMPUTE
from tests.parity.faults import Mutant, Patches
from tests.parity.harness import LLAMA, Case

OFFLOAD: dict[str, Any] = {"train.offload_activations": True}


def activations_of_the_microbatch_before() -> Patches:
    original = ArrayMover.to_host
    before: dict[int, list[Any]] = {}
    number = 0

    def stale(self: Any, flats: Sequence[Tensor]) -> tuple[list[Any], Any]:
        nonlocal number
        copies, event = original(self, flats)
        number += 1
        place = number % 4  # a block of four
        before[place], copies = copies, before.get(place, copies)
        return copies, event

    yield mock.patch.object(ArrayMover, "to_host", stale)


def every_view_is_its_storage_s_begin() -> Patches:
    original = offload._Saved.__init__

    def first(self: Any, *args: Any) -> None:
        original(self, *args)
        self.place = (*self.place[:2], 0)

    yield mock.patch.object(offload._Saved, "__init__", first)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(activations_of_the_microbatch_before, Case(1, 1, 1, {**OFFLOAD, **RECOMPUTE})),
    Mutant(every_view_is_its_storage_s_begin, Case(1, 1, 1, {**OFFLOAD, **LLAMA})),
)
