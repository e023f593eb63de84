"""Adafactor (Shazeer and Stern 2018): of a matrix's squared gradients, means of rows and columns only are kept.

The update is that of torch.optim.Adafactor with the paper's eps, whatever the layout: a mean over a side that tensor
ranks share is summed over them, and under ZeRO the data ranks, which have any ranges of the weights, add up theirs. The
means themselves are whole on all data ranks, being small; vectors have a mean for each element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.collectives import copy_from_first
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.zero.parts import Part, PlacedOptimizer

_SMALLEST_SCALE = 1e-3  # the root mean square of a weight counts as this at least
_LARGEST_UPDATE = 1.0  # an update of a larger root mean square is scaled down to it
_ADDED = 1e-30  # to each mean where it is used: a row or column without gradients has one to divide by
_ELEMENTS = 1 << 22  # of a parameter that are worked on at once, in whole rows
_DECAY = 0.8  # means are averaged with the new ones by 1 - step^-0.8


@dataclass
class _Job:
    """One parameter's part in a step: its group, weights and gradients (1-D, as long as the part)."""

    group: dict[str, Any]
    part: Part
    weights: Tensor
    gradients: Tensor
    step: int

    @property
    def split(self) -> bool:
        """Whether tensor ranks have a shard each."""
        return self.part.shard.dim is not None


class _Share(NamedTuple):
    """What this rank has of a sum: 1-D; data ranks have theirs under ZeRO, tensor ranks where it is `over_tensor`."""

    values: Tensor
    over_tensor: bool
    tied: bool


class Adafactor(PlacedOptimizer):
    """Adafactor without momentum; the rate is relative: `lr` at most step^-1/2, times the weight's own scale."""

    own_kinds = frozenset({"row_var", "col_var", "variance"})

    def __init__(self, groups: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.means: dict[str, dict[str, Tensor]] = {}

    def place(self, parts: Mapping[Tensor, Sequence[Part]], mesh: ParallelMesh, divided: bool) -> None:
        """Make the means of all parameters, which are zero."""
        super().place(parts, mesh, divided)
        for tensor, own in parts.items():
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            for part in own:
                self.means[part.shard.name] = {
                    kind: torch.zeros(shard.local_shape, dtype=dtype, device=tensor.device)
                    for kind, shard in mean_shards(part.shard).items()
                }

    def own_states(self) -> Iterator[tuple[Part, ShardSpec, str, Tensor]]:
        """Yield the means."""
        for parts in self.parts.values():
            for part in parts:
                shards = mean_shards(part.shard)
                for kind, values in self.means[part.shard.name].items():
                    yield part, shards[kind], kind, values

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; gradients are overwritten. All ranks of the stage must call."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        jobs = list(self._jobs())
        if not jobs:
            return
        squares = [_squares(job) for job in jobs]
        wanted = [
            (job, kind, values.view(-1)) for job, found in zip(jobs, squares, strict=True) for kind, values in found
        ]
        sums = iter(self._sum([_Share(values, _is_shared(job, kind), job.part.tied) for job, kind, values in wanted]))
        scales = []
        for job, found in zip(jobs, squares, strict=True):
            new = {kind: next(sums).view_as(values) for kind, values in found}
            scale = (new.pop("weight") / prod(job.part.shard.global_shape)).sqrt().clamp_(min=_SMALLEST_SCALE)
            scales.append(scale * min(job.group["lr"], job.step**-0.5))
            self._average(job, new)
            _make_update(job, self.means[job.part.shard.name])
        sizes = self._sum([_Share(_square_sum(job.gradients), job.split, job.part.tied) for job in jobs])
        for job, size, scale in zip(jobs, sizes, scales, strict=True):
            root = (size / prod(job.part.shard.global_shape)).sqrt()
            factor = scale / (root / _LARGEST_UPDATE).clamp_(min=1.0)
            job.weights.mul_(1.0 - job.group["lr"] * job.group["weight_decay"])
            job.weights.addcmul_(job.gradients, factor.to(job.weights.dtype), value=-1.0)

    def _jobs(self) -> Iterator[_Job]:
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                state = self.state[tensor]
                state["step"] = state.get("step", torch.zeros(())) + 1
                for part in self.parts[tensor]:
                    at = slice(part.offset, part.offset + part.length)
                    yield _Job(group, part, tensor.view(-1)[at], tensor.grad.view(-1)[at], int(state["step"]))

    def _average(self, job: _Job, sums: Mapping[str, Tensor]) -> None:
        """Move the means to those of this step's squares."""
        shape = job.part.shard.global_shape
        counts = {"row_var": shape[-1], "col_var": shape[-2] if len(shape) > 1 else 1, "variance": 1}
        for kind, mean in self.means[job.part.shard.name].items():
            mean.lerp_(sums[kind] / counts[kind], job.step**-_DECAY)

    def _sum(self, shares: Sequence[_Share]) -> list[Tensor]:
        """Return the whole sums, alike on all ranks that have a part of the same parameter."""
        replicas, tensor = (self.mesh.size(axis) for axis in ("replica", "tensor"))
        result: dict[int, Tensor] = {}
        for over_tensor, tied in sorted({share[1:] for share in shares}):
            chosen = {index: share.values for index, share in enumerate(shares) if share[1:] == (over_tensor, tied)}
            flat = torch.cat(list(chosen.values()))
            if self.divided and replicas > 1:
                dist.all_reduce(flat, group=self.mesh.group("replica"))
            if over_tensor and tensor > 1:
                dist.all_reduce(flat, group=self.mesh.group("tensor"))
                copy_from_first(flat, self.mesh.group("replica"))  # else each group's order would part the replicas
            if tied:  # whose parts are others on the other stage, and so the order of the sum
                copy_from_first(flat, self.mesh.group("embedding"))
            result |= zip(chosen, flat.split([value.numel() for value in chosen.values()]), strict=True)
        return [result[index] for index in range(len(shares))]


def mean_shards(shard: ShardSpec) -> dict[str, ShardSpec]:
    """Return the kinds of means of a parameter, each with its place in the whole; more than two dims are a batch."""
    if len(shard.global_shape) < 2:
        return {"variance": shard}
    last = len(shard.global_shape) - 1
    return {"row_var": _without(shard, last), "col_var": _without(shard, last - 1)}


def _without(shard: ShardSpec, gone: int) -> ShardSpec:
    """Return the place of means over dim `gone`."""
    whole, local = ((*shape[:gone], *shape[gone + 1 :]) for shape in (shard.global_shape, shard.local_shape))
    if shard.dim is None or shard.dim == gone:
        return ShardSpec.whole(shard.name, whole)
    return ShardSpec(shard.name, whole, local, shard.dim - (shard.dim > gone), shard.start, shard.length)


def _is_shared(job: _Job, kind: str) -> bool:
    """Return whether tensor ranks have a share each of a sum of squares: over the side that is split."""
    over = {"weight": job.part.shard.dim, "row_var": len(job.part.shard.global_shape) - 1, "variance": None}
    over["col_var"] = len(job.part.shard.global_shape) - 2
    return job.split and over[kind] == job.part.shard.dim


def _square_sum(values: Tensor) -> Tensor:
    """Return the sum of squares [1], in fp32 or wider, without a tensor of the squares."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dtype=wide).square_().view(1)


def _squares(job: _Job) -> list[tuple[str, Tensor]]:
    """Return this part's sums of squares: of the weights, and of the gradients for each mean."""
    dtype = torch.promote_types(job.weights.dtype, torch.float32)
    found = [("weight", _square_sum(job.weights))]
    for kind, shard in mean_shards(job.part.shard).items():
        found.append((kind, torch.zeros(shard.local_shape, dtype=dtype, device=job.weights.device)))
    means = [values for _, values in found[1:]]
    for part in _pieces(job.part):
        squares = job.gradients[part.offset : part.offset + part.length].to(dtype).square()
        if len(means) == 1:
            means[0][part.start : part.start + part.length] = squares
        else:
            _add_sums(part, squares, *means)
    return found


def _pieces(part: Part) -> Iterator[Part]:
    """Cut a part into pieces of bounded size, at the ends of rows; offsets count from its first element."""
    width = part.shard.local_shape[-1]
    most = max(1, _ELEMENTS // width) * width
    start, end = part.start, part.start + part.length
    while start < end:
        stop = min(end, (start // most + 1) * most)
        yield Part(part.shard, start - part.start, start, stop - start, part.counted)
        start = stop


def _add_sums(part: Part, squares: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add up the squares of a part by rows [..., R] and columns [..., C]."""
    height, width = part.shard.local_shape[-2:]
    first, matrix = _as_rows(part, squares, width)
    rows.view(-1)[first : first + len(matrix)] += matrix.sum(1)
    for batch in range(first // height, (first + len(matrix) - 1) // height + 1):
        top, bottom = (min(max(edge * height - first, 0), len(matrix)) for edge in (batch, batch + 1))
        columns.view(-1, width)[batch] += matrix[top:bottom].sum(0)


def _as_rows(part: Part, values: Tensor, width: int) -> tuple[int, Tensor]:
    """Return the first row that a part touches, and its values as whole rows, with zeros for what it lacks of two."""
    first, last = part.start // width, -(-(part.start + part.length) // width)
    before = part.start - first * width
    if before or part.length % width:
        values = torch.nn.functional.pad(values, (before, (last - first) * width - before - part.length))
    return first, values.view(-1, width)


def _make_update(job: _Job, means: Mapping[str, Tensor]) -> None:
    """Replace a part's gradients by them over the root of the estimate of their squares' mean."""
    if "variance" in means:
        estimate = means["variance"][job.part.start : job.part.start + job.part.length]
        job.gradients.mul_((estimate + _ADDED).rsqrt_())
        return
    shard = job.part.shard
    height, width = shard.local_shape[-2:]
    rows, columns = means["row_var"].view(-1, height) + _ADDED, means["col_var"].view(-1, width) + _ADDED
    # The mean of all squares is that of the rows' means and of the columns': the side is taken that is whole here.
    whole_rows = shard.dim != len(shard.local_shape) - 2
    columns = columns / (rows if whole_rows else columns).mean(1, keepdim=True)
    for part in _pieces(job.part):
        gradients = job.gradients[part.offset : part.offset + part.length]
        first, update = _as_rows(part, gradients, width)
        of_rows = rows.reshape(-1)[first : first + len(update), None]
        batch = torch.arange(first, first + len(update), device=rows.device) // height
        estimate = of_rows * (columns if len(columns) == 1 else columns[batch])
        # Where row and column have no gradients their product may be too small for a number; the gradient is 0 there.
        update = update * estimate.clamp_(min=torch.finfo(estimate.dtype).tiny).rsqrt_()
        before = part.start - first * width
        gradients.copy_(update.view(-1)[before : before + part.length])
