"""Sums of gradients over replicas that run while a step's last backward passes still make others.

Gradients lie in flat buckets from the beginning of a step on: what autograd adds to `.grad` it adds to the bucket that
is sent, so nothing is flattened or copied back. Buckets are made in the reverse order of the parameters, about that in
which a backward pass ends with them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.zero.engine import chunks_of, replicas_of, shard_of

LARGEST_BUCKET = 2**22
"""Elements, 16 MiB in fp32: a small part of a rank's gradients, as nothing is computed behind the last bucket's sum.
Not measured on GPUs, where a ring of many replicas may want more."""
LEAST_BUCKETS = 8
"""In which a small model's gradients are summed at least: of fewer hardly one would run beside computation."""


class OverlappedSums:
    """The buckets of one rank's gradients; a bucket's sum begins once all its gradients are final.

    Final is a gradient when as many backward passes as the step has for it have added to it: one a microbatch for each
    chunk that uses the parameter. A bucket waits for those before it, so that all ranks that hold the same weights sum
    the same buckets in the same order, whenever they come to it.

    A step is: `begin`, backward passes, `finish`; then `forget`, whatever became of it. Gradients of 16 bits are added
    to their fp32 `masters` between passes by whoever owns these, the last one here.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        masters: Sequence[Tensor],
        mesh: ParallelMesh,
        *,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self._masters = dict(zip(weights, masters, strict=True))
        shared = [weight for weight in weights if mesh.size(replicas_of(shard_of(weight))) > 1]
        self._buckets = [
            _Bucket(bucket, mesh.group(replicas_of(shard_of(bucket[0]))), reduce_dtype)
            for bucket in overlapped_buckets(shared, lambda weight: replicas_of(shard_of(weight)))
        ]
        self._bucket_of = {weight: bucket for bucket in self._buckets for weight in bucket.weights}
        self._left: dict[Tensor, int] = {}
        self._started = 0
        came = WeakMethod(self._came)  # autograd's hold of a hook is out of the garbage collector's sight

        def tell(weight: Tensor) -> None:
            if (told := came()) is not None:
                told(weight)

        for weight in shared:
            weight.register_post_accumulate_grad_hook(tell)

    def begin(self, microbatches: int) -> None:
        """Give the masters gradients of zeros, each a part of its bucket."""
        self._started = 0
        self._left = {weight: microbatches * chunks_of(weight) for weight in self._bucket_of}
        for bucket in self._buckets:
            bucket.begin([self._masters[weight] for weight in bucket.weights])

    def finish(self) -> None:
        """Begin the sums of what is left, and wait for all."""
        self._left = {}
        self._start(self._buckets[self._started :])
        for bucket in self._buckets:
            bucket.finish()

    def forget(self) -> None:
        """Let go of the buckets; no sum may be under way."""
        for bucket in self._buckets:
            bucket.forget()

    def _came(self, weight: Tensor) -> None:
        """Take note of a gradient that autograd has added to the parameter's."""
        if weight not in self._left:
            return
        self._left[weight] -= 1
        assert self._left[weight] >= 0, f"{shard_of(weight).name}: a gradient came after the last that was expected"
        if self._left[weight] > 0:
            return
        bucket, master = self._bucket_of[weight], self._masters[weight]
        if master is not weight:
            assert master.grad is not None and weight.grad is not None
            master.grad.add_(weight.grad)
            weight.grad = None
        bucket.missing -= 1
        while self._started < len(self._buckets) and self._buckets[self._started].missing == 0:
            self._start(self._buckets[self._started : self._started + 1])

    def _start(self, buckets: Sequence[_Bucket]) -> None:
        for bucket in buckets:
            bucket.start()
        self._started += len(buckets)


class _Bucket:
    """The gradients of some parameters, one flat tensor while there is a step."""

    def __init__(self, weights: Sequence[Tensor], group: dist.ProcessGroup, reduce_dtype: torch.dtype | None) -> None:
        self.weights, self.group, self.reduce_dtype = weights, group, reduce_dtype
        self.missing = 0
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._flat: Tensor | None = None
        self._sum: tuple[dist.Work, Tensor] | None = None

    def begin(self, masters: Sequence[Tensor]) -> None:
        self.missing, self._sum = len(masters), None
        self._flat = masters[0].new_zeros(sum(master.numel() for master in masters), requires_grad=False)
        parts = self._flat.split([master.numel() for master in masters])
        self._parts = [(master, part.view_as(master)) for master, part in zip(masters, parts, strict=True)]
        for master, part in self._parts:
            master.grad = part

    def start(self) -> None:
        assert self._flat is not None, "a step begins before it is reduced"
        assert all(master.grad is part for master, part in self._parts), "a gradient has left its bucket"
        travelling = self._flat if self.reduce_dtype is None else self._flat.to(self.reduce_dtype)
        work = dist.all_reduce(travelling, group=self.group, async_op=True)
        assert work is not None
        self._sum = work, travelling

    def finish(self) -> None:
        assert self._sum is not None and self._flat is not None
        work, travelling = self._sum
        work.wait()
        if travelling is not self._flat:
            self._flat.copy_(travelling)
        self._sum = None

    def forget(self) -> None:
        self._flat, self._parts = None, []


def overlapped_buckets(tensors: Sequence[Tensor], kind_of: Callable[[Tensor], Hashable]) -> Iterator[list[Tensor]]:
    """Yield the tensors from the last to the first in lists of one kind, in the order in which the lists end."""
    most = min(LARGEST_BUCKET, sum(tensor.numel() for tensor in tensors) // LEAST_BUCKETS)
    filling: dict[Hashable, list[Tensor]] = {}
    for tensor in reversed(tensors):
        bucket = filling.setdefault(kind_of(tensor), [])
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > most:
            yield filling.pop(kind_of(tensor))
            bucket = filling.setdefault(kind_of(tensor), [])
        bucket.append(tensor)
    yield from filling.values()
