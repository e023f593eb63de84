"""Checkpoints as a world of ranks writes them, without processes: tensor shards cut into flat data shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.names import checkpoint_name, hidden
from megalm.checkpoint.writer import FILE_BYTES, RankWriter, encode_state, finish
from megalm.distributed.sharding import Fragment, ShardSpec


@dataclass(frozen=True)
class Logical:
    """A whole tensor and the dim along which tensor parallelism splits it (None: replicated)."""

    values: Tensor
    dim: int | None = None

    def spec(self, name: str, index: int, count: int) -> ShardSpec:
        shape = tuple(self.values.shape)
        return (
            ShardSpec.whole(name, shape) if self.dim is None else ShardSpec.split(name, shape, self.dim, index, count)
        )

    def local(self, name: str, index: int, count: int) -> Tensor:
        """Return what a rank holds: the padded local tensor."""
        spec = self.spec(name, index, count)
        out = torch.zeros(spec.local_shape, dtype=self.values.dtype)
        if spec.dim is None:
            return self.values.clone()
        out.narrow(spec.dim, 0, spec.length).copy_(self.values.narrow(spec.dim, spec.start, spec.length))
        return out


def zero_fragments(tensors: Mapping[str, Logical], kind: str, tensor: int, data: int) -> list[list[Fragment]]:
    """Return the fragments of each rank (tensor fastest): its shards' concatenation in `data` equal parts."""
    ranks: list[list[Fragment]] = [[] for _ in range(tensor * data)]
    for index in range(tensor):
        held = [(name, item) for name, item in tensors.items() if item.dim is not None or index == 0]
        total = sum(item.local(name, index, tensor).numel() for name, item in held)
        part = -(-total // data)
        for rank in range(data):
            offset = 0
            for name, item in held:
                flat = item.local(name, index, tensor).flatten()
                low = min(max(part * rank - offset, 0), flat.numel())
                high = min(max(part * (rank + 1) - offset, 0), flat.numel())
                offset += flat.numel()
                spec = item.spec(name, index, tensor)
                ranks[rank * tensor + index].append(Fragment(spec, kind, low, flat[low:high]))
    return ranks


def even_fragments(tensors: Mapping[str, Logical], kind: str, tensor: int, data: int) -> list[list[Fragment]]:
    """Return the fragments of each rank (tensor fastest) as ZeRO 3 cuts: each shard in `data` equal parts."""
    ranks: list[list[Fragment]] = [[] for _ in range(tensor * data)]
    for name, item in tensors.items():
        for index in range(tensor if item.dim is not None else 1):
            spec, flat = item.spec(name, index, tensor), item.local(name, index, tensor).flatten()
            part = -(-flat.numel() // data)
            for rank in range(data):
                low, high = (min(edge * part, flat.numel()) for edge in (rank, rank + 1))
                ranks[rank * tensor + index].append(Fragment(spec, kind, low, flat[low:high]))
    return ranks


class HastyFileSystem(FileSystem):
    """Syncs nothing, for tests that are about other things."""

    def sync(self, descriptor: int) -> None:
        """Return at once."""

    def sync_directory(self, path: Path) -> None:
        """Return at once."""


def write_ranks(
    root: Path,
    step: int,
    ranks: Iterable[Iterable[Fragment]],
    state: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint as the given ranks would, one after the other."""
    files = HastyFileSystem()
    final = root / checkpoint_name(step)
    partial = hidden(final, "partial")
    files.make_directory(root)
    files.remove_tree(partial)
    files.make_directory(partial)
    reports, lists = [], {}
    for rank, fragments in enumerate(ranks):
        writer = RankWriter(files, partial, rank, step, file_bytes)
        writer.write(fragments)
        report, rows = json.loads(json.dumps(writer.report()))
        reports.append(report)
        lists |= rows
    finish(files, final, step, encode_state(state or {"step": step}), {"world": len(reports)}, reports, lists)
    return final


def small_model(seed: int = 0) -> dict[str, Logical]:
    """Return a few tensors of a Transformer, with a vocabulary that does not divide."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "embedding.weight": Logical(normal(37, 8), 0),
        "blocks.0.attention.out.weight": Logical(normal(8, 12), 1),
        "blocks.0.mlp.up.weight": Logical(normal(2, 12, 8), 1),
        "final_norm.weight": Logical(normal(8)),
    }
