"""Planted faults where communication runs beside computation: sums too early, chunks not waited for or out of place."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalm.pipeline_parallel.weight_gradients import Owed
from megalm.tensor_parallel import chunks, linear
from megalm.tensor_parallel.chunks import Arrival
from megalm.zero import overlap
from megalm.zero.overlap import OverlappedSums
from tests.parity.cases import SEQUENCE, schedule
from tests.parity.faults import Mutant, Patches
from tests.parity.harness import Case

GRADIENTS: dict[str, Any] = {"overlap.gradients": True}
CHUNKS: dict[str, Any] = {"overlap.tensor_chunks": 2}
INTERLEAVED = schedule("interleaved", 2)


def sums_begin_one_microbatch_early() -> Patches:
    original = OverlappedSums.begin
    yield mock.patch.object(OverlappedSums, "begin", lambda self, microbatches: original(self, microbatches - 1))


def sums_of_an_early_bucket_are_taken_once_more() -> Patches:
    original = overlap._Bucket.start

    def twice(self: Any) -> None:
        original(self)
        if self.missing == 0:
            original(self)

    yield mock.patch.object(overlap._Bucket, "start", twice)


def tied_weight_summed_after_its_first_use() -> Patches:
    yield mock.patch.object(overlap, "chunks_of", lambda parameter: 1)


def last_gradient_halved_before_its_sum() -> Patches:
    original = OverlappedSums._came

    def halved(self: Any, weight: Any) -> None:
        if self._left.get(weight) == 1:
            weight.grad.mul_(0.5)
        original(self, weight)

    yield mock.patch.object(OverlappedSums, "_came", halved)


def sums_not_waited_for() -> Patches:
    def unfinished(self: Any) -> None:
        self._flat.copy_(self._flat * 0.5)  # as if the other replica's half had not come yet
        self._sum = None

    yield mock.patch.object(overlap._Bucket, "finish", unfinished)


def buckets_of_a_rank_in_another_order() -> Patches:
    original = overlap.overlapped_buckets

    def exchanged(tensors: Any, kind_of: Any) -> Any:
        found = list(original(tensors, kind_of))
        if torch.distributed.get_rank() == 1:
            same = [n for n, b in enumerate(found) if sum(t.numel() for t in b) == sum(t.numel() for t in found[2])]
            one, other = same[0], same[-1]
            assert one != other, "there are buckets of one size"
            found[one], found[other] = found[other], found[one]
        return found

    yield mock.patch.object(overlap, "overlapped_buckets", exchanged)


def experts_in_the_buckets_of_all_replicas() -> Patches:
    yield mock.patch.object(overlap, "replicas_of", lambda shard: "replica")


def chunk_of_a_row_parallel_layer_not_waited_for() -> Patches:
    """What is not waited for may be there by luck, so it is what was there before: this rank's own part."""
    original = chunks.start_sum

    def unwaited(x_ND: Tensor, group: Any) -> Arrival:
        arrival = original(x_ND, group)
        arrival.wait()
        return Arrival(x_ND.clone())

    yield mock.patch.object(chunks, "start_sum", unwaited)


def chunks_joined_in_the_order_of_their_gradients() -> Patches:
    def reversed_rows(self: Any, arrivals: Any) -> Tensor:
        return torch.cat([arrivals.pop(index).wait() for index in reversed(range(len(self.sizes)))])

    yield mock.patch.object(chunks._Way, "all_of", reversed_rows)


def tokens_of_chunks_laid_rank_after_rank() -> Patches:
    def side_by_side(products: Any, x: Tensor, group: Any, sequence: bool) -> Tensor:
        return torch.cat(tuple(products)).unflatten(0, (x.shape[0], -1))

    yield mock.patch.object(linear, "entered", side_by_side)


def gradient_of_a_chunk_taken_for_another_s() -> Patches:
    original = chunks._Arrive.backward

    def exchanged(ctx: Any, gradient: Tensor) -> Any:
        ctx.index = len(ctx.way.sizes) - 1 - ctx.index
        return original(ctx, gradient)

    yield mock.patch.object(chunks._Arrive, "backward", staticmethod(exchanged))


def weights_owed_for_the_last_chunk_alone() -> Patches:
    original = Owed.pay

    def some(self: Any) -> None:
        object.__setattr__(self, "pieces", self.pieces[-1:])
        original(self)

    yield mock.patch.object(Owed, "pay", some)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(sums_begin_one_microbatch_early, Case(1, 2, 1, GRADIENTS)),
    Mutant(sums_of_an_early_bucket_are_taken_once_more, Case(2, 2, 1, {**GRADIENTS, **schedule("zb-h1")})),
    Mutant(tied_weight_summed_after_its_first_use, Case(1, 2, 1, {**GRADIENTS, **INTERLEAVED})),
    Mutant(last_gradient_halved_before_its_sum, Case(1, 2, 1, GRADIENTS)),
    Mutant(sums_not_waited_for, Case(1, 2, 2, GRADIENTS)),
    Mutant(buckets_of_a_rank_in_another_order, Case(1, 2, 1, GRADIENTS)),
    Mutant(
        experts_in_the_buckets_of_all_replicas,
        Case(1, 4, 1, {**GRADIENTS, "model.experts": 4, "model.expert_ffn": 16, "parallel.expert": 2,
                       "train.micro_batch": 1}),
    ),
    Mutant(chunk_of_a_row_parallel_layer_not_waited_for, Case(1, 1, 2, CHUNKS)),
    Mutant(chunks_joined_in_the_order_of_their_gradients, Case(1, 1, 2, {**CHUNKS, **SEQUENCE})),
    Mutant(tokens_of_chunks_laid_rank_after_rank, Case(1, 1, 2, {"overlap.tensor_chunks": 3, **SEQUENCE})),
    Mutant(gradient_of_a_chunk_taken_for_another_s, Case(2, 1, 2, {**CHUNKS, **SEQUENCE, **INTERLEAVED})),
    Mutant(weights_owed_for_the_last_chunk_alone, Case(1, 1, 2, {**CHUNKS, **schedule("zb-h1")})),
)  # fmt: skip
