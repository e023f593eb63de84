"""Stage 0: every data rank holds all of its model part; gradients are summed over the data axis in flat buckets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megalm.distributed.collectives import copy_from_first
from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.zero.engine import (
    LARGEST_NORM,
    HeldBytes,
    MakeOptimizer,
    ReadFragment,
    ZeroEngine,
    counted_here,
    kept_buffers,
    replicas_of,
    restore_optimizer,
    shard_of,
    storage_bytes,
    tensor_states,
)
from megalm.zero.frozen import FrozenWeights
from megalm.zero.overlap import OverlappedSums
from megalm.zero.parts import Part, elementwise, own_fragments, own_states, place
from megalm.zero.saving import saved_by_stage, saved_range

BUCKET_ELEMENTS = 2**25
"""Gradients are reduced in flat buffers of about this many elements: large enough for full bandwidth."""


class ReplicatedEngine(ZeroEngine):
    """Plain data parallelism around a torch optimizer.

    Weights of 16 bits get fp32 master weights, and their gradients are accumulated over microbatches in fp32.
    """

    loss_factor = 1.0

    def __init__(
        self,
        module: nn.Module,
        mesh: ParallelMesh,
        make_optimizer: MakeOptimizer,
        *,
        tied_weight: Tensor | None,
        clip_norm: float | None,
        reduce_dtype: torch.dtype | None = None,
        grad_norm: Callable[..., Tensor],
        overlap: bool = False,
    ) -> None:
        self.module = module
        self.mesh = mesh
        self.grad_norm = grad_norm
        self.tied_weight = tied_weight
        self.clip_norm = clip_norm
        self.reduce_dtype = reduce_dtype  # None: as they are
        parameters = list(module.parameters())
        self.frozen = FrozenWeights([*parameters, *kept_buffers(module)], mesh, tied_weight)
        self.weights: list[Tensor] = [parameter for parameter in parameters if parameter.requires_grad]
        self.mixed = parameters[0].dtype in (torch.bfloat16, torch.float16)
        self.dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        self.masters: list[Tensor] = [w.detach().float() for w in self.weights] if self.mixed else self.weights
        self.counted = [counted_here(w, mesh, tied_weight) for w in self.weights]
        self.tied_master = next((m for w, m in zip(self.weights, self.masters, strict=True) if w is tied_weight), None)
        self.optimizer = make_optimizer([(shard_of(w), m) for w, m in zip(self.weights, self.masters, strict=True)])
        whole = zip(self.weights, self.masters, self.counted, strict=True)
        parts = {m: [Part(shard_of(w), 0, 0, m.numel(), counted)] for w, m, counted in whole}
        place(self.optimizer, parts, mesh, divided=False)
        sums = OverlappedSums(self.weights, self.masters, mesh, reduce_dtype=reduce_dtype) if overlap else None
        self.overlapped = sums
        """None: gradients are summed when all are there."""

    def begin(self, microbatches: int) -> None:
        """Lay out the gradients of a step that are to be summed while others are made."""
        if self.overlapped is not None:
            self.overlapped.begin(microbatches)

    def microbatch_done(self) -> None:
        """Add gradients of 16 bits to the fp32 ones; other dtypes accumulate by themselves."""
        if not self.mixed:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def reduce(self) -> None:
        """Sum all gradients over the ranks with the same weights, then tied ones over the embedding group.

        Experts' are fewer ranks: their gradients are sums over the tokens of all ranks that divide the experts already.

        In this order: the two stages have the tied gradient at different places of their buckets, so that its sum over
        the data group may differ in the last bit between them, and the sum of the two sums does not.
        """
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        if self.overlapped is not None:
            self.overlapped.finish()
        else:
            self._sum_over_replicas()
        if self.tied_master is not None:
            dist.all_reduce(self.tied_master.grad, group=self.mesh.group("embedding"))

    def _sum_over_replicas(self) -> None:
        for axis, masters in self._by_replicas().items():
            for bucket in buckets([m.grad for m in masters if m.grad is not None]):
                flat = _flatten_dense_tensors(bucket).to(self.reduce_dtype or self.dtype)
                dist.all_reduce(flat, group=self.mesh.group(axis))
                torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))

    def _by_replicas(self) -> dict[Axis, list[Tensor]]:
        """Return the master weights by the axis of the ranks that hold them too, where there are any others."""
        found: dict[Axis, list[Tensor]] = {}
        for weight, master in zip(self.weights, self.masters, strict=True):
            axis = replicas_of(shard_of(weight))
            if self.mesh.size(axis) > 1:
                found.setdefault(axis, []).append(master)
        return found

    def update(self, lr: float) -> float:
        """Clip by the norm over the whole model, update, and round the masters to the weights' dtype."""
        norm = self._norm()
        if norm > LARGEST_NORM:
            norm = math.inf
        if math.isfinite(norm):
            factor = 1.0 if self.clip_norm is None else self.clip_norm / (norm + 1e-6)
            if factor < 1.0 and self.masters:
                torch._foreach_mul_([m.grad for m in self.masters if m.grad is not None], factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
            self.spread_weights()
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop the gradients."""
        for master in self.masters:
            master.grad = None
        if self.overlapped is not None:
            self.overlapped.forget()

    def _norm(self) -> float:
        counted = [
            master.grad
            for weight, master, counts in zip(self.weights, self.masters, self.counted, strict=True)
            if counts and master.grad is not None and self._first_of_experts(shard_of(weight))
        ]
        square = torch.zeros((), dtype=self.dtype, device=self.mesh.device)
        if counted:
            square = self.grad_norm(counted, squared=True)
        axes: tuple[Axis, ...] = ("model", "expert")
        for axis in axes:
            if self.mesh.size(axis) > 1:
                dist.all_reduce(square, group=self.mesh.group(axis))
        # Each data index has summed over a group of its own; an order of its own would let replicas drift apart.
        copy_from_first(square, self.mesh.group("replica"))
        return square.sqrt().item()

    def _first_of_experts(self, shard: ShardSpec) -> bool:
        """Return whether this rank counts a tensor among those that divide the experts: all count their own experts."""
        return shard.first_expert is not None or self.mesh.index("expert") == 0

    def gradients(self) -> Iterator[Fragment]:
        """Yield whole local gradients: every data rank holds them."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert master.grad is not None, "gradients are there between reduce() and update()"
            yield Fragment(shard_of(weight), "gradient", 0, master.grad.flatten())

    def counted_gradients(self) -> Iterator[Fragment]:
        """Yield an equal part of every gradient that this model rank counts."""
        for weight, master, counted in zip(self.weights, self.masters, self.counted, strict=True):
            if counted and master.grad is not None:
                axis = replicas_of(shard_of(weight))
                index, count = self.mesh.index(axis), self.mesh.size(axis)
                start, stop = (weight.numel() * edge // count for edge in (index, index + 1))
                yield Fragment(shard_of(weight), "gradient", start, master.grad.flatten()[start:stop])

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's share of every tensor, so that the ranks that hold it write equal parts of one copy."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if not saved_by_stage(weight, self.mesh, self.tied_weight):
                continue
            shard = shard_of(weight)
            start, stop = saved_range(master, shard, replicas_of(shard), self.mesh)
            own = {"weight": master.detach(), **dict(tensor_states(self.optimizer.state[master], master.numel()))}
            for kind, values in own.items() if start < stop else ():
                yield Fragment(shard_of(weight), kind, start, values.flatten()[start:stop])
        yield from own_fragments(self.optimizer, self.mesh)
        yield from self.frozen.state()

    def read_optimizer(self, read: ReadFragment, kinds: Sequence[str], steps: int) -> None:
        """Read whole local tensors."""
        alike = elementwise(self.optimizer, kinds)
        states = restore_optimizer(self.optimizer, alike, steps)
        for weight, master in zip(self.weights, self.masters, strict=True):
            for kind in (kind for kind in alike if kind in states[master]):
                read(shard_of(weight), kind, 0, master.numel(), states[master][kind].view(-1))
        for _, shard, kind, values in own_states(self.optimizer):
            read(shard, kind, 0, values.numel(), values.view(-1))

    def read_weights(self, read: ReadFragment) -> None:
        """Read whole local tensors."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            read(shard_of(weight), "weight", 0, master.numel(), master.view(-1))
        self.frozen.load(read)

    def masters_and_states(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield every master weight: stage 0 divides nothing."""
        for master in self.masters:
            yield master, self.optimizer.state[master]

    @torch.no_grad()
    def spread_weights(self) -> None:
        """Round the masters to the weights' dtype, where they are two."""
        if self.mixed and self.weights:
            torch._foreach_copy_(self.weights, self.masters)

    def replicas(self, axis: Axis = "replica") -> Iterator[tuple[str, Tensor]]:
        """Yield weights, master weights and optimizer state: stage 0 divides nothing."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if replicas_of(shard_of(weight)) != axis:
                continue
            name = shard_of(weight).name
            yield f"the weight {name}", weight
            if self.mixed:
                yield f"the master weight {name}", master
            for kind, values in tensor_states(self.optimizer.state[master], master.numel()):
                yield f"{kind} of {name}", values
        if axis == "replica":
            for _, shard, kind, values in own_states(self.optimizer):
                yield f"{kind} of {shard.name}", values
        for parameter in self.frozen.parameters:
            if replicas_of(shard_of(parameter)) == axis:
                yield f"the weight {shard_of(parameter).name}", parameter

    def held_bytes(self) -> HeldBytes:
        """Return whole tensors' bytes: stage 0 divides nothing."""
        states = [v for m in self.masters for _, v in tensor_states(self.optimizer.state[m], m.numel())]
        states += [values for *_, values in own_states(self.optimizer)]
        return HeldBytes(
            weights=storage_bytes(self.weights + self.frozen.parameters),
            master_weights=storage_bytes(self.masters) if self.mixed else 0,
            gradients=storage_bytes([m.grad for m in self.masters if m.grad is not None]),
            optimizer=storage_bytes(states),
        )


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in lists of at most about BUCKET_ELEMENTS elements."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
