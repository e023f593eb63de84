"""What is stated of a rank's step because it cannot run without numbers: what ZeRO holds, and what it sends.

Tests hold it to what runs of several processes hold and send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from megalm.config.deepspeed import deepspeed_config
from megalm.config.run import RunConfig
from megalm.config.storage import BYTES, optimizer_states, stored, wide_dtype
from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.sharding import ShardSpec
from megalm.dry_run.recording import Call, Names
from megalm.models.build import DTYPES
from megalm.models.transformer import Transformer
from megalm.nn.router import SUMS
from megalm.train.adafactor import mean_shards
from megalm.train.optimizers import Treatment, grouped
from megalm.zero.engine import replicas_of, shard_of
from megalm.zero.overlap import overlapped_buckets
from megalm.zero.replicated import buckets

_ALIGNMENT = 2  # elements, times the ranks: how DeepSpeed 0.19.8 pads a flat group (nccl_start_alignment_factor)
_BUCKET = 5e8  # its reduce_bucket_size where a JSON has none
_WHOLE_BELOW = 100_000  # its stage3_param_persistence_threshold where a JSON has none
_SCALED = 256  # numbers of adamw8bit's state that share a scale


@dataclass(frozen=True)
class _Group:
    """A group of the optimizer; `size` elements of it, padding included, are whole, and `part` are on each replica.

    `axis` is that of its replicas, of which experts that ranks divide have fewer.
    """

    axis: Axis
    how: Treatment
    tensors: list[Tensor]
    size: int
    part: int


class Stated:
    """What a rank's engine holds and sends: `module` is its part of the model, `mesh` its place."""

    def __init__(self, config: RunConfig, module: Transformer, mesh: ParallelMesh, tied_weight: Tensor | None) -> None:
        self.config, self.mesh, self.names = config, mesh, Names(mesh)
        self.stage, self.replicas = config.zero.stage, mesh.size("replica")
        self.parameters, self.routers = list(module.parameters()), len(module.routers)
        self.tied = tied_weight if tied_weight is not None and tied_weight.requires_grad else None
        joined = deepspeed_config(config, mesh.size("data"))
        self.zero: dict[str, Any] = joined["zero_optimization"]
        self.wide = DTYPES[wide_dtype(config)]
        self.travelling = DTYPES[
            joined.get("communication_data_type") or config.train.reduce_dtype or wide_dtype(config)
        ]
        self.checks_overflow = config.precision == "bf16" and joined["bf16"].get("check_grad_overflow", True)
        if self.stage == 3:
            self.checks_overflow = config.precision == "fp16"
        self.groups = list(self._groups())
        self.bucket = min(int(self.zero.get("reduce_bucket_size", _BUCKET)), max(1, _elements(self.parameters)))

    def _groups(self) -> Iterator[_Group]:
        """Yield the groups; divided experts that a group has beside others are one of their own behind all of them."""
        trained = [(shard_of(p), p) for p in self.parameters if p.requires_grad]
        behind = []
        for how, tensors in grouped(self.config.optim, trained, self.config.model.width_factor):
            by_axis = _by_axis(tensors)
            axis, *others = sorted(by_axis, key=lambda axis: axis != "replica")
            yield self._group(axis, how, by_axis[axis])
            behind += [self._group(other, how, by_axis[other]) for other in others]
        yield from behind

    def _group(self, axis: Axis, how: Treatment, tensors: list[Tensor]) -> _Group:
        size, ranks = _elements(tensors), self.mesh.size(axis)
        if self.stage == 0:
            return _Group(axis, how, tensors, size, size)
        if self.stage == 3:  # each parameter by itself
            part = sum(-(-tensor.numel() // ranks) for tensor in tensors)
            return _Group(axis, how, tensors, part * ranks, part)
        unit = _ALIGNMENT * ranks
        size = -(-size // unit) * unit
        return _Group(axis, how, tensors, size, size // ranks)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters with gradients, in the order of the optimizer's groups."""
        return [tensor for group in self.groups for tensor in group.tensors]

    def held(self) -> dict[str, int]:
        """Return the bytes of weights, master weights, gradients (between reduction and update) and optimizer state."""
        found = dict.fromkeys(("weights", "master_weights", "gradients", "optimizer"), 0)
        for row in stored(self.config):
            if row.group in ("master_weights", "gradients"):
                found[row.group] += BYTES[row.dtype] * self._trained_elements(self.stage >= row.from_stage)
        found["weights"] = self._weights()
        found["optimizer"] = self._states()
        return found

    def _trained_elements(self, divided: bool) -> int:
        return sum(group.part for group in self.groups) if divided else _elements(self.trained)

    def _weights(self) -> int:
        size = BYTES[self.config.precision]
        frozen = [p for p in self.parameters if not p.requires_grad]
        if self.stage < 3:
            return size * (sum(group.size for group in self.groups) + _elements(frozen))
        smallest = int(self.zero.get("stage3_param_persistence_threshold", _WHOLE_BELOW))
        whole = [p for p in self.parameters if p.numel() <= smallest]
        parts = sum(-(-p.numel() // self.replicas) for p in self.parameters)
        block = self.zero.get("zero_hpz_partition_size", 1)
        copies = parts * self.replicas // block if block > 1 else 0
        return size * (parts + copies + _elements(whole))

    def _states(self) -> int:
        kind, divided = self.config.optim.kind, self.stage > 0
        states = optimizer_states(self.config)
        total = 0
        for group in self.groups:
            elements = group.part if divided else group.size
            own = dict(states)
            if kind == "muon":
                formats = own.pop("momentum_buffer")
                kinds = ("momentum_buffer",) if group.how.muon else ("exp_avg", "exp_avg_sq")
                own |= dict.fromkeys(kinds, formats)
            for dtype in own.values():
                total += _eight_bits(group.tensors) if dtype == "8 bits" else BYTES[dtype] * elements
            if kind == "adafactor":  # alike on all replicas
                shapes = [s.local_shape for p in group.tensors for s in mean_shards(shard_of(p)).values()]
                total += self.wide.itemsize * sum(prod(shape) for shape in shapes)
        return total

    def buffers(self) -> int:
        """Return the bytes of the buckets that DeepSpeed's stages 1 and 2 hold while gradients are made."""
        if self.stage not in (1, 2) or not self.groups or not self.zero.get("contiguous_gradients", True):
            return 0
        dtype = self.wide if self.stage == 1 else DTYPES[self.config.precision]
        return self.bucket * dtype.itemsize * (2 if self.zero.get("overlap_comm") else 1)

    def in_host(self) -> list[str]:
        """Return the entries of `held` that the DeepSpeed JSON keeps in the memory of the host."""
        found = []
        if _offloads(self.zero.get("offload_optimizer")):
            found += ["master_weights", "gradients", "optimizer"]
        if _offloads(self.zero.get("offload_param")):
            found.append("weights")
        return found

    def begin(self) -> list[Call]:
        """Return what is sent before the first forward: how many tokens count."""
        return self._one("all-reduce", "data", torch.float64)

    def early_buckets(self) -> list[list[Tensor]]:
        """Return the buckets whose sums stage 0 begins while the last gradients are made; none where it does not."""
        if self.stage > 0 or self.replicas == 1 or not self.config.overlap.gradients:
            return []
        shared = [p for p in self.parameters if p.requires_grad and self.mesh.size(replicas_of(shard_of(p))) > 1]
        return list(overlapped_buckets(shared, lambda p: replicas_of(shard_of(p))))

    def microbatch(self, arrived: Sequence[Tensor]) -> list[Call]:
        """Return what is sent after a microbatch's backward, whose gradients came in this order: under stage 2."""
        return self._buckets(arrived) if self.stage == 2 else []

    def reduce(self) -> list[Call]:
        """Return what is sent for the sums of the step's gradients."""
        calls: list[Call] = []
        if self.stage == 0:
            whole = _by_axis(p for p in self.parameters if p.requires_grad).values()
            for bucket in self.early_buckets() or [bucket for tensors in whole for bucket in buckets(tensors)]:
                calls += self._sum(replicas_of(shard_of(bucket[0])), _elements(bucket), self.travelling)
        elif self.stage == 1:
            calls += self._buckets(self.trained)
        if self.tied is not None:
            calls += self._sum("replica", self.tied.numel(), self.wide) if self.stage > 0 else []
            calls += self._sum("embedding", self.tied.numel(), self.wide)
        return calls

    def update(self) -> list[Call]:
        """Return what is sent for loss, norm and new weights, without what an optimizer sends by itself."""
        calls = self._one("all-reduce", "world", torch.float64)  # the loss
        calls += self._centralize() if self.config.optim.centralize else []
        if self.stage == 0:
            calls += self._one("all-reduce", "model", self.wide) + self._one("all-reduce", "expert", self.wide)
            return calls + self._one("broadcast", "replica", self.wide)
        if self.checks_overflow:
            calls += self._one("all-reduce", "replica", torch.uint8) + self._one("all-reduce", "model", torch.uint8)
        calls += self._one("all-reduce", "world", self.wide)
        if self.stage < 3:
            for group in self.groups:
                calls += self._call("all-gather", group.axis, group.size, DTYPES[self.config.precision])
        return calls

    def loads(self) -> list[Call]:
        """Return what is sent after an update for the biases that even out the experts' loads."""
        model = self.config.model
        if model.router_bias_rate is None or model.experts is None:
            return []
        return self._sum("data", self.routers * (model.experts + len(SUMS)), torch.float64)

    def after(self) -> list[Call]:
        """Return what is sent after a step: whether a signal came."""
        return self._one("all-reduce", "world", torch.int32)

    def assumed(self) -> list[str]:
        """Return what is taken to be so, in lines."""
        return [] if self.config.model.experts is None else ["assumed: tokens go evenly to the experts"]

    def unstated(self) -> list[str]:
        """Return what is not in the lists, in lines."""
        lines = []
        if self.stage == 3 and self.zero.get("zero_quantized_weights"):
            lines.append("weights travel in 8 bits and with their scales, but are listed as they are")
        if self.config.optim.kind in ("muon", "adafactor"):
            lines.append(f"what {self.config.optim.kind} sends in its update is not listed")
        if self.in_host():
            lines.append("offloaded gradients travel to the host as they are made; its buffers are not counted")
        return lines

    def _buckets(self, tensors: Sequence[Tensor]) -> list[Call]:
        """Return the reductions of gradients in that order, as DeepSpeed 0.19.8 fills its bucket with them."""
        sums: list[tuple[Axis, int]] = []
        filled: dict[Axis, int] = {}  # a bucket has one sum for each axis
        for tensor in tensors:
            axis, size = replicas_of(shard_of(tensor)), tensor.numel()
            if sum(filled.values()) + size > self.bucket:
                sums += filled.items()
                filled = {}
            if size > self.bucket:
                sums += [(axis, piece) for piece in self._pieces(tensor)]
            else:
                filled[axis] = filled.get(axis, 0) + size
        return [call for axis, size in [*sums, *filled.items()] for call in self._sum(axis, size, self.travelling)]

    def _pieces(self, tensor: Tensor) -> Iterator[int]:
        """Yield in which sizes a gradient that is larger than the bucket is reduced: cut at the ends of partitions."""
        cuts = self.zero.get("reduce_scatter", True) and self.config.precision != "fp64"
        if not cuts and len(_by_axis(self.parameters)) == 1:
            yield tensor.numel()
            return
        group = next(group for group in self.groups if any(own is tensor for own in group.tensors))
        at = 0
        for own in group.tensors:
            if own is tensor:
                break
            at += own.numel()
        stop, taken = at + tensor.numel(), 0
        while at < stop:
            edge = min(stop, (at // group.part + 1) * group.part)
            taken, at = taken + edge - at, edge
            if taken > self.bucket or at == stop:
                yield taken
                taken = 0

    def _centralize(self) -> list[Call]:
        calls: list[Call] = []
        for axis, tensors in sorted(_by_axis(self.trained).items(), reverse=True):  # "replica" first
            specs = [shard_of(p) for p in tensors if len(shard_of(p).global_shape) > 1]
            rows, cut = sum(map(_rows, specs)), sum(_rows(s) for s in specs if s.dim == len(s.global_shape) - 1)
            calls += self._sum(axis, rows, self.wide) if self.stage > 0 else []
            calls += self._sum("tensor", cut, self.wide)
            calls += self._call("broadcast", axis, rows, self.wide) if self.stage == 0 else []
            if axis == "replica" and self.tied is not None:
                calls += self._call("broadcast", "embedding", _rows(shard_of(self.tied)), self.wide)
        return calls

    def _one(self, operation: str, axis: str, dtype: torch.dtype) -> list[Call]:
        return self._call(operation, axis, 1, dtype)

    def _sum(self, axis: str, elements: int, dtype: torch.dtype) -> list[Call]:
        return self._call("all-reduce", axis, elements, dtype)

    def _call(self, operation: str, axis: str, elements: int, dtype: torch.dtype) -> list[Call]:
        group = world_group() if axis == "world" else self.mesh.group(axis)  # type: ignore[arg-type]
        if group.size() == 1 or elements == 0:
            return []
        return [Call(operation, self.names.of(group), group.size(), elements, dtype)]


def _by_axis(tensors: Iterable[Tensor]) -> dict[Axis, list[Tensor]]:
    """Return parameters by the axis of the ranks that hold the same part."""
    found: dict[Axis, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(replicas_of(shard_of(tensor)), []).append(tensor)
    return found


def _rows(spec: ShardSpec) -> int:
    return prod(spec.local_shape[:-1])


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _eight_bits(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of one kind of adamw8bit's state."""
    sizes = [tensor.numel() for tensor in tensors]
    return sum(size + 4 * (size // _SCALED) if size >= 4096 and size % _SCALED == 0 else 4 * size for size in sizes)


def _offloads(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"
