"""A Hugging Face directory in any layout: any local shard, or flat range of it, by the bytes that it needs.

`HuggingFaceReader` offers what `CheckpointReader` does of weights, so a model goes straight from the files into
whatever layout asks. Which tensors ours are made of is the family's table; the files are never trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError, ConfigError
from megalm.models.huggingface.families import Family, family_of
from megalm.models.huggingface.mapping import Bound, Box, bind, flat_boxes, narrowed, overlap
from megalm.models.huggingface.safetensors_files import StoredTensor, open_directory, read_json, read_view

CONFIG = "config.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HuggingFaceReader:
    """The model in a directory of `config.json` and safetensors, open for reading.

    `family`, `section` (keys of the recipe's model section) and `model` say what it is; each tensor is there, of the
    shape that the config makes it, or opening raises CheckpointError, or ConfigError for the config; no number is read
    for that. Every method may raise CheckpointError. `bytes_read` counts what was asked for of the files.
    """

    def __init__(self, directory: Path) -> None:
        """Read and check `config.json` and the headers."""
        self.directory = directory
        self.step, self.bytes_read = 0, 0
        self.stored = open_directory(directory)
        values = read_json(directory / CONFIG)
        self.config = values
        self.family: Family = family_of(values, str(directory / CONFIG))
        where = str(directory / CONFIG)
        self.section: dict[str, Any] = self.family.section(values, where, len(self.stored))
        self.model = ModelSection.model_validate(self.section)
        try:
            self.bound = bind(self.family.rows, self.model, self.model.vocab or 0)
        except ConfigError as error:
            raise ConfigError(f"{where}: {self.family.in_their_words(str(error))}") from error
        self._check()

    def kinds(self) -> list[str]:
        """Return the kinds of tensors that are there."""
        return ["weight"]

    def names(self, kind: str) -> list[str]:
        """Return the logical names of the tensors of one kind, sorted."""
        return sorted(self.bound) if kind == "weight" else []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by logical name."""
        return {name: bound.spec.global_shape for name, bound in self.bound.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor: the widest of those that it is made of, which holds each of them exactly."""
        found = {self._their(their).dtype for their in self.bound[name].names}
        first, *others = sorted(found, key=str)
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def read_local(self, shard: ShardSpec, kind: str = "weight") -> Tensor:
        """Return the local tensor of `shard`, a CPU tensor of the stored dtype; padding is zero."""
        return self.read_flat(shard, kind, 0, prod(shard.local_shape)).reshape(shard.local_shape)

    def read_flat(self, shard: ShardSpec, kind: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of `shard`'s row-major flattened local tensor; padding is zero.

        `out`, where it is given, is filled and returned: contiguous, 1-D, of any dtype, to which numbers are cast.
        """
        bound = self._bound(shard, kind)
        out = torch.empty(stop - start, dtype=self.dtype(shard.name)) if out is None else out
        out.zero_()
        at = 0
        for box in flat_boxes(shard.local_shape, start, stop):
            sizes = [high - low for low, high in box]
            self._fill(bound, _held(shard, box), shard, out[at : at + prod(sizes)].view(sizes), box)
            at += prod(sizes)
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each whole tensor under its logical name, one by one."""
        for name, bound in self.bound.items():
            yield name, self.read_local(bound.spec)

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _fill(self, bound: Bound, box: Box, shard: ShardSpec, out: Tensor, local: Box) -> None:
        """Fill `out`, the local box `local`, where it is no padding: the global box `box`."""
        if not all(low < high for low, high in box):
            return
        first = _origin(shard)
        inside = out
        for dim, ((low, high), (begin, _)) in enumerate(zip(box, local, strict=True)):
            inside = inside.narrow(dim, low - first[dim] - begin, high - low)
        origin = [low for low, _ in box]
        for piece, shape, inner in bound.boxes(box):
            target = narrowed(inside, piece, origin).view(shape)
            for part in bound.layout.parts:
                common = overlap(part, inner)
                if common is None:
                    continue
                view = narrowed(part.view, common, part.at)
                values = read_view(self._their(bound.names[part.index]), view)
                self.bytes_read += values.numel() * values.element_size()
                narrowed(target, common, [low for low, _ in inner]).copy_(values)

    def _bound(self, shard: ShardSpec, kind: str) -> Bound:
        bound = self.bound.get(shard.name) if kind == "weight" else None
        if bound is None:
            raise CheckpointError(f"{self.directory}: no {shard.name} ({kind}) in this {self.family.name} model")
        if bound.spec.global_shape != tuple(shard.global_shape):
            raise CheckpointError(
                f"{self.directory}: {shard.name} has shape {bound.spec.global_shape} there and "
                f"{tuple(shard.global_shape)} in this model; make the model section that of its config.json"
            )
        return bound

    def _their(self, name: str) -> StoredTensor:
        """Return a tensor by its full name, also where a bare model was saved."""
        found = self.stored.get(name) or self.stored.get(name.removeprefix(self.family.prefix))
        if found is None:
            raise CheckpointError(f"{self.directory}: no tensor {name}, which a {self.family.name} model has")
        return found

    def _check(self) -> None:
        """Raise CheckpointError unless the files hold what the model is made of, and nothing else."""
        used = set()
        for bound in self.bound.values():
            for name, shape in zip(bound.names, bound.layout.theirs, strict=True):
                stored = self._their(name)
                used.add(id(stored))
                if stored.shape != shape or stored.dtype not in FLOATS:
                    raise CheckpointError(
                        f"{stored.file}: {name} is {stored.dtype} of shape {stored.shape}, of which config.json makes "
                        f"a float of shape {shape}; the two are not of one model"
                    )
        tied = self._tied_heads()
        for name, stored in self.stored.items():
            known = id(stored) in used or name in tied
            if not known and not any(re.fullmatch(pattern, name) for pattern in self.family.ignored):
                raise CheckpointError(
                    f"{self.directory}: tensor {name!r:.80} is none of a {self.family.name} model of this config; "
                    "megalm would leave it out, so the model is refused"
                )

    def _tied_heads(self) -> list[str]:
        """Return the heads in the files of a model whose head is the embedding."""
        heads = [name for row in self.family.rows if row.ours == "head.weight" for name in row.theirs]
        return [name for name in heads if name in self.stored and self.model.tie_embeddings]

    def check_tied(self) -> None:
        """Raise CheckpointError unless a head that the config ties to the embedding holds the same numbers.

        Reads both, where there is such a head, so one process is to call it.
        """
        for name in self._tied_heads():
            self._compare(name, self._their(self.bound["embedding.weight"].names[0]), self.stored[name])

    def _compare(self, name: str, embedding: StoredTensor, head: StoredTensor) -> None:
        same = embedding.shape == head.shape and embedding.dtype == head.dtype
        blank, rows = torch.empty(embedding.shape, device="meta"), max(1, (1 << 22) // max(1, embedding.shape[1]))
        for first in range(0, embedding.shape[0] if same else 0, rows):
            part = blank[first : first + rows]
            same = same and torch.equal(read_view(embedding, part), read_view(head, part))
        if not same:
            raise CheckpointError(
                f"{self.directory}: {name} differs from the embedding, to which config.json ties it "
                "(tie_word_embeddings); set that to false there"
            )


def _origin(shard: ShardSpec) -> list[int]:
    """Return the global indices of a shard's first element."""
    first = [0] * len(shard.global_shape)
    if shard.dim is not None:
        first[shard.dim] = shard.start
    if shard.first_expert is not None:
        first[0] = shard.first_expert
    return first


def _held(shard: ShardSpec, box: Box) -> Box:
    """Return the global indices of a local box, without padding."""
    first = _origin(shard)
    held = [(low + at, high + at) for (low, high), at in zip(box, first, strict=True)]
    if shard.dim is not None:
        low, high = held[shard.dim]
        held[shard.dim] = (low, min(high, shard.start + shard.length))
    return tuple(held)
