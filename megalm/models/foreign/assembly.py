"""Tensors that lie in pieces in another program's files, made whole one by one, under our names.

Owns the comparison with the model that a recipe builds: each of its tensors must be there, in its shape, and nothing
may be left over, before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError
from megalm.models.build import build_stage
from megalm.models.foreign.names import EMBEDDING, Place, joined, rows, whole

logger = logging.getLogger(__name__)

NORMS = ("attention_norm.weight", "mlp_norm.weight", "final_norm.weight", "q_norm.weight", "k_norm.weight")
_MOST_NAMED = 4


class Lying(Protocol):
    """A tensor in a file: its shape and its dtype are known before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are."""
        ...

    def read(self) -> Tensor:
        """Return its numbers, contiguous."""
        ...


@dataclass
class Pieces:
    """One tensor of theirs: where it belongs, and what the tensor ranks hold of it, in their order."""

    source: str
    layer: int | None
    place: Place
    parts: Sequence[Lying]

    def named(self, model: ModelSection, parts: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return our tensors of these parts, with whole names."""
        prefix = "" if self.layer is None else f"blocks.{self.layer}."
        return [(f"{prefix}{name}", tensor) for name, tensor in joined(self.place, parts, model)]


@dataclass
class Assembly:
    """All weights of a model, or all states of one kind that its optimizer keeps for them.

    `path` is for messages. With `from_zero` the weights of norms are stored less 1. Rows of the vocabulary beyond
    `model.vocab` are padding and left out.
    """

    path: str
    model: ModelSection
    from_zero: bool = False
    pieces: list[Pieces] = field(default_factory=list)
    copies: list[Pieces] = field(default_factory=list)
    """The tied embedding's copies, at the other end of the model."""

    def add(self, source: str, layer: int | None, place: Place, parts: Sequence[Lying]) -> None:
        """Take a tensor of theirs."""
        is_copy = place.name == "head.weight" and self.model.tie_embeddings
        (self.copies if is_copy else self.pieces).append(Pieces(source, layer, place, parts))

    def check(self) -> None:
        """Raise CheckpointError unless the tensors are those of the model, by names and shapes; reads none."""
        layers = {pieces.layer for pieces in self.pieces} - {None}
        if len(layers) != self.model.layers:  # before a model of so many is built
            raise CheckpointError(
                f"{self.path}: holds {len(layers)} layers, its arguments describe {self.model.layers}"
            )
        expected = expected_shapes(self.model)
        found: dict[str, tuple[int, ...]] = {}
        for pieces in self.pieces:
            odd = next((part.dtype for part in pieces.parts if not part.dtype.is_floating_point), None)
            if odd is not None:
                raise CheckpointError(f"{self.path}: {pieces.source} is {odd}, no weight's; nothing was imported")
            try:
                made = pieces.named(self.model, [torch.empty(part.shape, device="meta") for part in pieces.parts])
            except (RuntimeError, ValueError, IndexError) as error:
                shapes = ", ".join(str(list(part.shape)) for part in pieces.parts)
                raise CheckpointError(f"{self.path}: the parts of {pieces.source}, {shapes}, do not fit") from error
            for name, tensor in made:
                if name in found:
                    raise CheckpointError(f"{self.path}: holds {name} twice, the second time as {pieces.source}")
                found[name] = tuple(self._without_padding(name, tensor).shape)
        self._compare(expected, found)

    def _compare(self, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
        for names, what in (
            (expected.keys() - found.keys(), "lacks"),
            (found.keys() - expected.keys(), "holds beside the model that its arguments describe:"),
        ):
            if names:
                raise CheckpointError(f"{self.path}: {what} {_listed(names)}; nothing was imported")
        for name, shape in expected.items():
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(found[name])}, its arguments describe {list(shape)}; "
                    "nothing was imported"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our tensors, whole, one after the other. Raises CheckpointError where copies differ."""
        for pieces in self.pieces:
            parts = [part.read() for part in pieces.parts]
            if pieces.place.join is whole:
                self._compare_ranks(pieces, parts)
            for name, tensor in pieces.named(self.model, parts):
                made = self._without_padding(name, tensor)
                if name == "embedding.weight":
                    self._compare_copies(tensor)
                yield name, (made + 1.0 if self.from_zero and name.endswith(NORMS) else made).contiguous()

    def fragments(self, kind: str) -> Iterator[Fragment]:
        """Yield them as states of an optimizer, of a kind."""
        for name, values in self.tensors():
            yield Fragment(ShardSpec.whole(name, tuple(values.shape)), kind, 0, values.flatten())

    def _without_padding(self, name: str, tensor: Tensor) -> Tensor:
        if name not in ("embedding.weight", "head.weight") or self.model.vocab is None:
            return tensor
        return tensor[: self.model.vocab]

    def _compare_ranks(self, pieces: Pieces, parts: Sequence[Tensor]) -> None:
        """Say where tensor ranks differ in what they hold alike: each trained with its own, the first's is taken."""
        for rank, part in enumerate(parts[1:], start=1):
            if not torch.equal(part, parts[0]):
                by = (part.double() - parts[0].double()).abs().max().item()
                logger.warning("%s: %s of tensor rank %d is not rank 0's, by up to %.1e; rank 0's is taken",
                               self.path, pieces.source, rank, by)  # fmt: skip

    def _compare_copies(self, embedding: Tensor) -> None:
        for copy in self.copies:
            if not torch.equal(rows([part.read() for part in copy.parts]), embedding):
                raise CheckpointError(
                    f"{self.path}: {copy.source} differs from the embedding to which it is tied; one of them is damaged"
                )


def rows_of(path: str, found: Iterable[tuple[Place, Sequence[Lying]]]) -> int:
    """Return how many rows of tokens there are, those of all parts of an embedding together. Raises CheckpointError."""
    parts = [part for place, parts in found if place is EMBEDDING for part in parts]
    if not all(part.shape for part in parts):
        raise CheckpointError(f"{path}: its embedding is a single number, without rows of tokens; nothing was imported")
    return sum(part.shape[0] for part in parts)


def section_of(values: Mapping[str, Any], path: str) -> ModelSection:
    """Return the section `model` of its values. Raises CheckpointError for one that a recipe does not allow."""
    try:
        return ModelSection.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}: its arguments give model.{key}={first['input']!r:.80}: {first['msg']}"
        ) from error


def expected_shapes(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a model by its logical name. Raises ConfigError for one that cannot be."""
    given = model.model_dump(exclude_unset=True)
    training: dict[str, Any] = {"steps": 1, "global_batch": 1, "micro_batch": 1}
    config = RunConfig.model_validate({"model": given, "train": training, "optim": {"lr": 1.0}})
    assert model.vocab is not None, "the vocabulary is known from the embedding"
    stage = build_stage(config, model.vocab, ParallelMesh.on_meta(RankLayout(), 0))
    shards: list[ShardSpec] = [parameter.shard for parameter in stage.parameters()]  # type: ignore[attr-defined]
    return {shard.name: shard.global_shape for shard in shards}


def _listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    known = sorted(names)
    more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
    return ", ".join(known[:_MOST_NAMED]) + more
