"""What a recipe does to reduced gradients before they are clipped by their norm: centralization, clipping by value.

A rank's gradients are pieces of flattened local tensors, cut by the tensor axis and, wherever it happens to be, by
ZeRO; what needs whole rows is summed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.collectives import all_reduce_sum, copy_from_first
from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment
from megalm.zero.engine import ZeroEngine, replicas_of, shard_of


def scale_gradients(engine: ZeroEngine, factor: float) -> None:
    """Multiply the gradients that `engine` holds between `reduce` and `update`."""
    if factor != 1.0:
        for fragment in engine.gradients():
            fragment.values.mul_(factor)


def condition_gradients(engine: ZeroEngine, config: RunConfig, mesh: ParallelMesh) -> None:
    """Change the gradients that `engine` holds between `reduce` and `update`. Every rank of the mesh must call."""
    if config.optim.centralize:
        centralize(engine, mesh, divided=config.zero.stage > 0)
    if config.train.clip_grad_value is not None:
        for fragment in engine.gradients():
            clip_by_value(fragment.values, config.train.clip_grad_value)


def clip_by_value(values: Tensor, limit: float) -> None:
    """Cut each gradient to [-limit, limit] in place; infinite ones become NaN, so that the norm still shows them."""
    values.masked_fill_(values.isinf(), math.nan).clamp_(-limit, limit)


def centralize(engine: ZeroEngine, mesh: ParallelMesh, divided: bool) -> None:
    """Take from each row of each matrix's gradient, embeddings included, its mean, in place (Yong et al. 2020).

    A row is what leads to one output: the last dimension of the whole tensor. `divided`: each data rank holds other
    pieces of the gradients.
    """
    axes: tuple[Axis, ...] = ("replica", "expert_replica")
    for axis in axes:
        _centralize(engine, mesh, divided, axis)


def _centralize(engine: ZeroEngine, mesh: ParallelMesh, divided: bool, axis: Axis) -> None:
    """Centralize the gradients of those parameters that the ranks along an axis hold alike."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad and replicas_of(shard_of(p)) == axis]
    if not parameters:
        return
    specs = [spec for spec in map(shard_of, parameters) if len(spec.global_shape) > 1]
    specs.sort(key=lambda spec: spec.dim != len(spec.global_shape) - 1)  # those of cut rows first; their order stays
    rows = [math.prod(spec.local_shape[:-1]) for spec in specs]
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    sums = torch.zeros(sum(rows), dtype=dtype, device=mesh.device)
    row_sums = dict(zip((spec.name for spec in specs), sums.split(rows), strict=True))
    matrices = [fragment for fragment in engine.gradients() if fragment.shard.name in row_sums]
    for fragment in matrices:
        for at, part in _by_rows(fragment):
            row_sums[fragment.shard.name][at] += part.sum(dim=-1, dtype=dtype).to(mesh.device)
    if divided:
        sums.copy_(all_reduce_sum(sums, mesh.group(axis)))
    cut = sums[: sum(n for n, spec in zip(rows, specs, strict=True) if spec.dim == len(spec.global_shape) - 1)]
    cut.copy_(all_reduce_sum(cut, mesh.group("tensor")))
    if not divided:  # replicas stay the same bits, whatever order each group sums in
        copy_from_first(sums, mesh.group(axis))
    if engine.tied_weight is not None and shard_of(engine.tied_weight).name in row_sums:
        # Its rows are cut at other places on the other stage, and so the order of the sums.
        copy_from_first(row_sums[shard_of(engine.tied_weight).name], mesh.group("embedding"))
    for fragment in matrices:
        mean = row_sums[fragment.shard.name] / fragment.shard.global_shape[-1]
        for at, part in _by_rows(fragment):
            part.sub_(mean[at].unsqueeze(-1).to(part.device))


def _by_rows(fragment: Fragment) -> Iterator[tuple[slice, Tensor]]:
    """Yield the local rows that a fragment reaches, with views [rows, columns] of what it holds of them."""
    values, width = fragment.values, fragment.shard.local_shape[-1]
    head = min(-fragment.start % width, values.numel())
    whole = (values.numel() - head) // width
    row, at = fragment.start // width, 0
    for count, columns in ((1, head), (whole, width), (1, values.numel() - head - whole * width)):
        if count * columns:
            yield slice(row, row + count), values[at : at + count * columns].view(count, columns)
            row, at = row + count, at + count * columns
