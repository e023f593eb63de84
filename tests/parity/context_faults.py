"""Planted faults in context parallelism: tokens, keys and gradients that end up on the wrong rank or place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalm.context_parallel import attention, ring, ulysses
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import Places, Run, whole
from megalm.models import transformer
from megalm.nn import attention as nn_attention
from megalm.nn import ops
from megalm.nn.dropout import Dropout
from megalm.zero.replicated import ReplicatedEngine
from tests.parity.cases import ALIBI, DROPOUT, LLAMA, PACKED, RING, SEQUENCE, ULYSSES, WINDOWS, zero
from tests.parity.faults import Mutant, Patches
from tests.parity.harness import Case


def gradients_summed_over_data_ranks_only() -> Patches:
    original = ReplicatedEngine.reduce

    def over_data(self: Any) -> None:
        groups = {**self.mesh.groups, "replica": self.mesh.group("data")}
        whole_mesh, self.mesh = self.mesh, replace(self.mesh, groups=groups)
        original(self)
        self.mesh = whole_mesh

    yield mock.patch.object(ReplicatedEngine, "reduce", over_data)


def every_context_rank_rotates_from_position_0() -> Patches:
    original = transformer.Transformer._context

    def from_the_start(self: Any, *arguments: Any) -> Any:
        own, context = original(self, *arguments)
        places = whole(sum(length for _, length in own))
        return own, replace(context, rotate=self.position.rotation(places))

    yield mock.patch.object(transformer.Transformer, "_context", from_the_start)


def labels_of_neighbouring_tokens_for_a_zigzag() -> Patches:
    original = transformer.select

    def in_a_row(x: Tensor, places: Places, dim: int = 1) -> Tensor:
        if x.dtype is not torch.bool:
            return original(x, places, dim)
        length = sum(length for _, length in places)
        return x.narrow(dim, min(first for first, _ in places), length)

    yield mock.patch.object(transformer, "select", in_a_row)


def parts_of_a_row_merged_as_if_they_weighed_alike() -> Patches:
    def alike(before: Any, out_BTHE: Tensor, lse_BHT: Tensor) -> tuple[Tensor, Tensor]:
        if before is None:
            return out_BTHE, lse_BHT
        return (before[0] + out_BTHE) / 2, torch.logaddexp(before[1], lse_BHT)

    yield mock.patch.object(ring, "_merge", alike)


def keys_that_pass_by_are_taken_for_ones_own() -> Patches:
    original = ring._Ring.pairs
    yield mock.patch.object(ring._Ring, "pairs", lambda self, step: original(self, 0))


def key_gradients_stay_where_they_were_made() -> Patches:
    original = ring._Ring.pass_on

    def kept(self: Any, x: Tensor) -> Any:
        """Of two ranks' four messages the last brings the gradients home."""
        passing, calls = original(self, x), getattr(self, "calls", 0)
        object.__setattr__(self, "calls", calls + 1)
        return replace(passing, received=x) if calls == 3 else passing

    yield mock.patch.object(ring._Ring, "pass_on", kept)


def gradients_of_a_part_made_with_its_own_sum() -> Patches:
    original = ops.REFERENCE

    def own_sum(dout: Tensor, dlse: Any, out: Tensor, lse: Tensor, *qkv: Tensor, **how: Any) -> Any:
        own_lse = original.partial_attention(*qkv, **how)[1]
        return original.partial_attention_gradients(dout, dlse, out, own_lse, *qkv, **how)

    broken = replace(original, partial_attention_gradients=own_sum)
    yield mock.patch.object(nn_attention, "select_operations", lambda kernels, device: broken)


def dropout_counts_a_rank_s_tokens_from_0() -> Patches:
    original = Dropout.on

    def from_the_start(self: Any, keys: Any, places: Places, tokens: int) -> Any:
        return original(self, keys, (Run(0, sum(length for _, length in places)),), tokens)

    yield mock.patch.object(Dropout, "on", from_the_start)


def masks_of_the_ring_forget_where_keys_stand() -> Patches:
    original = ring._Ring.pairs

    def at_the_start(self: Any, step: int) -> Any:
        for i, j, part, keys in original(self, step):
            first, _, *sizes = part["within"]
            yield i, j, {**part, "within": (first - first % keys.length, 0, *sizes)}, keys

    yield mock.patch.object(ring._Ring, "pairs", at_the_start)


def documents_of_ones_own_tokens_only() -> Patches:
    def own(self: Any, queries: Run, keys: Run) -> Any:
        numbers_BT = self.documents.numbers_BT
        return numbers_BT.narrow(1, *queries), numbers_BT.narrow(1, *queries)

    yield mock.patch.object(ring._Ring, "_numbers", own)


def windows_leave_out_the_rank_before() -> Patches:
    original = ring._Ring.pairs
    yield mock.patch.object(
        ring._Ring, "pairs", lambda self, step: (pair for pair in original(self, step) if step == 0 or pair[0] == 1)
    )


def heads_change_places_with_tokens_out_of_order() -> Patches:
    def in_order_of_ranks(x_BTHX: Tensor, group: Any) -> Tensor:
        blocks = x_BTHX.unflatten(2, (group.size(), -1)).movedim(2, 0)
        return ulysses.exchange_blocks(blocks, group).transpose(0, 1).flatten(1, 2)

    yield mock.patch.object(ulysses, "to_heads", in_order_of_ranks)


def every_rank_has_the_masks_of_the_first_heads() -> Patches:
    original = ulysses.replace
    yield mock.patch.object(ulysses, "replace", lambda drop, first: original(drop))


def every_rank_has_the_slopes_of_the_first_heads() -> Patches:
    original = attention.all_to_all_attention

    def first_slopes(attend: Any, group: Any, *qkv: Tensor, **how: Any) -> Any:
        slopes_H = how["slopes_H"]
        own = len(slopes_H) // group.size()
        return original(attend, group, *qkv, **how | {"slopes_H": slopes_H[:own].repeat(group.size())})

    yield mock.patch.object(attention, "all_to_all_attention", first_slopes)


def one_data_rank_s_context_ranks_take_other_rows() -> Patches:
    original = ParallelMesh.coordinates.fget  # type: ignore[attr-defined]

    def shifted(self: Any) -> Any:
        at = original(self)
        return replace(at, data=(at.data + at.context) % self.layout.data)

    yield mock.patch.object(ParallelMesh, "coordinates", property(shifted))


MUTANTS: tuple[Mutant, ...] = (
    Mutant(gradients_summed_over_data_ranks_only, Case(1, 2, 1, RING)),
    Mutant(every_context_rank_rotates_from_position_0, Case(1, 1, 1, {**RING, **LLAMA})),
    Mutant(labels_of_neighbouring_tokens_for_a_zigzag, Case(1, 1, 1, RING)),
    Mutant(parts_of_a_row_merged_as_if_they_weighed_alike, Case(1, 1, 1, RING)),
    Mutant(keys_that_pass_by_are_taken_for_ones_own, Case(1, 1, 2, RING)),
    Mutant(key_gradients_stay_where_they_were_made, Case(1, 1, 1, RING)),
    Mutant(gradients_of_a_part_made_with_its_own_sum, Case(1, 1, 1, RING)),
    Mutant(dropout_counts_a_rank_s_tokens_from_0, Case(1, 1, 2, {**RING, **SEQUENCE, **DROPOUT})),
    Mutant(masks_of_the_ring_forget_where_keys_stand, Case(1, 1, 1, {**RING, **ALIBI})),
    Mutant(documents_of_ones_own_tokens_only, Case(1, 1, 1, {**RING, **PACKED})),
    Mutant(windows_leave_out_the_rank_before, Case(1, 1, 1, {**RING, **WINDOWS})),
    Mutant(heads_change_places_with_tokens_out_of_order, Case(1, 1, 1, ULYSSES)),
    Mutant(every_rank_has_the_masks_of_the_first_heads, Case(1, 1, 1, {**ULYSSES, **DROPOUT})),
    Mutant(every_rank_has_the_slopes_of_the_first_heads, Case(1, 1, 1, {**ULYSSES, **ALIBI})),
    Mutant(one_data_rank_s_context_ranks_take_other_rows, Case(1, 2, 1, {**RING, **zero(1)})),
)
