"""Checkpoints of Megatron-LM in the format `torch_dist`, that of torch.distributed.checkpoint.

    DIR/iter_0001000/.metadata, common.pt, __0_0.distcp, ...

`.metadata` is a pickle that says which chunk of which tensor lies where; a chunk is a file of torch.save inside a
.distcp file. Tensors stand there as those of the whole model, the layers of older versions stacked in a first dim, and
so does what Adam keeps, in the formats that keep it by parameter (not `dp_reshardable`): `optimizer.state.KIND.NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError
from megalm.models.foreign.assembly import Assembly, section_of
from megalm.models.foreign.imported_model import ForeignModel
from megalm.models.foreign.megatron import arguments, facts_of, precision_of, vocabulary
from megalm.models.foreign.megatron_arguments import model_of, zero_centered
from megalm.models.foreign.names import EMBEDDING, Place, is_no_weight, place_of
from megalm.models.foreign.torch_file import MAPPING, Opaque, Piece, StoredTensor, read_file, read_files

INDEX = ".metadata"
MASTERS, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")
_STATE = re.compile(r"optimizer\.state\.([a-z0-9_]+)\.(.+)")
_STACKED = re.compile(r"(.*\blayers)\.([a-z_].*)")
_FILE = re.compile(r"[A-Za-z0-9_]{1,80}\.distcp")

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a chunk begins in the whole tensor, and its lengths."""


@dataclass
class ChunkedTensor:
    """A tensor in chunks; `layer` (None: all of it) is the one of its first dim that is meant."""

    name: str
    size: tuple[int, ...]
    places: Mapping[Region, Piece]
    chunks: dict[Region, StoredTensor] = field(default_factory=dict)
    """Filled by `find_chunks`, for all tensors together."""
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths, without that of the layers."""
        return self.size if self.layer is None else self.size[1:]

    def read(self) -> Tensor:
        """Return the whole, or its one layer."""
        whole: Tensor | None = None
        for (begin, length), stored in self.chunks.items():
            if self.layer is not None and not begin[0] <= self.layer < begin[0] + length[0]:
                continue
            values = stored.read()
            if self.layer is not None:
                values, begin = values[self.layer - begin[0]], begin[1:]
            if whole is None:
                whole = torch.empty(self.shape, dtype=values.dtype)
            whole[tuple(slice(at, at + count) for at, count in zip(begin, values.shape, strict=True))] = values
        assert whole is not None, f"{self.name}: chunks are the whole of it, so one has layer {self.layer}"
        return whole


def find_chunks(tensors: Iterable[ChunkedTensor]) -> None:
    """Find each chunk's numbers in its file. Raises CheckpointError where one is not what the index says."""
    wanted = [(tensor, region, piece) for tensor in tensors for region, piece in tensor.places.items()]
    for (tensor, region, piece), stored in zip(wanted, read_files([item[2] for item in wanted]), strict=True):
        if not isinstance(stored, StoredTensor) or stored.shape != region[1]:
            raise CheckpointError(f"{piece.path}: a chunk of {tensor.name} is no tensor of {list(region[1])}")
        tensor.chunks[region] = stored


def read_distributed(directory: Path, vocab: int | None = None) -> ForeignModel:
    """Return the model of an iteration's directory, with what Adam keeps where it is kept by parameter.

    Raises CheckpointError for what a recipe cannot express, and where tensors are missing or left over.
    """
    common = read_file(directory / "common.pt")
    common = common if isinstance(common, dict) else {}
    given = arguments(common.get("args"), str(directory / "common.pt"))
    section = model_of(given, str(directory))
    kinds = _by_kind(_index(directory), section["layers"], directory)
    if not all(kind in kinds for kind in MOMENTS):
        kinds = {kind: tensors for kind, tensors in kinds.items() if kind not in MOMENTS}
    if MASTERS in kinds:
        del kinds[""]
    weights = kinds.get(MASTERS) or kinds.get("", [])
    rows = sum(tensor.shape[0] for _, _, place, tensor in weights if place is EMBEDDING)
    section["vocab"] = vocabulary(rows, vocab, str(directory))
    model = section_of(section, str(directory))
    assembly = _assembly(weights, directory, model, zero_centered(given))
    moments = [(kind, _assembly(kinds[kind], directory, model, False)) for kind in MOMENTS if kind in kinds]
    find_chunks({id(found[3].places): found[3] for tensors in kinds.values() for found in tensors}.values())
    step = common.get("iteration")
    step = step if type(step) is int and step >= 0 else 0
    facts = facts_of(given, "Megatron-LM", step, rows)
    if moments:
        facts |= {"optimizer_steps": _updates(common, step)}

    def optimizer() -> Iterator[Fragment]:
        return chain.from_iterable(part.fragments(kind) for kind, part in moments)

    return ForeignModel(model, assembly.tensors, facts, step, precision_of(given), optimizer)


_Found = tuple[str, int | None, Place, ChunkedTensor]


def _assembly(tensors: list[_Found], directory: Path, model: ModelSection, from_zero: bool) -> Assembly:
    assembly = Assembly(str(directory), model, from_zero)
    for found in tensors:
        assembly.add(found[0], found[1], found[2], [found[3]])
    assembly.check()
    return assembly


def _updates(common: Mapping[str, Any], step: int) -> int:
    """Return the updates that Adam has made: as the optimizer counts them, else the iterations."""
    value: Any = common
    for key in ("optimizer", "state", "common_step"):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, StoredTensor) and value.shape in ((), (1,)):
        value = value.read().item()
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 else step


def _by_kind(tensors: Mapping[str, ChunkedTensor], layers: int, directory: Path) -> dict[str, list[_Found]]:
    """Return the tensors by the kind of state ("": weights), stacked layers one by one."""
    kinds: dict[str, list[_Found]] = {}
    for source, tensor in tensors.items():
        state = _STATE.fullmatch(source)
        kind, name = (state[1], state[2]) if state else ("", source)
        if is_no_weight(name) or kind not in ("", MASTERS, *MOMENTS):
            continue
        if name.startswith(("optimizer.", "rng_state", "rerun_state")):
            continue
        stacked = _STACKED.fullmatch(name)
        for layer in range(layers) if stacked else (None,):
            place = place_of(f"{stacked[1]}.{layer}.{stacked[2]}" if stacked else name)
            if place is None or (layer is not None and tensor.size[:1] != (layers,)):
                raise CheckpointError(
                    f"{directory}: holds {source} {list(tensor.size)}, which a recipe has no tensor for"
                )
            whole = tensor if layer is None else replace(tensor, layer=layer)
            kinds.setdefault(kind, []).append((source, *place, whole))
    return kinds


def _index(directory: Path) -> dict[str, ChunkedTensor]:
    """Return the tensors that the index names, with their chunks' places."""
    path = directory / INDEX
    try:
        return dict(_tensors(read_file(path, alone=True), directory))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: not an index of torch.distributed.checkpoint ({error!r})") from error


def _tensors(index: Opaque, directory: Path) -> Iterator[tuple[str, ChunkedTensor]]:
    storage = {}
    for key, place in _pairs(index.state["storage_data"]):
        storage[key.state["fqn"], _numbers(key.state["offset"] or ())] = place.state
    for name, about in _pairs(index.state["state_dict_metadata"]):
        if not about.name.endswith("TensorStorageMetadata"):
            continue
        size = _numbers(about.state["size"])
        chunks: dict[Region, Piece] = {}
        for chunk in about.state["chunks"]:
            begin, length = _numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])
            if len(begin) != len(size) or any(a + n > whole for a, n, whole in zip(begin, length, size, strict=True)):
                raise ValueError(f"{name} has a chunk outside of it")
            chunks[begin, length] = _piece(storage[name, begin], directory)
        if sum(prod(length) for _, length in chunks) != prod(size):
            raise ValueError(f"the chunks of {name} are not the whole of it")
        yield name, ChunkedTensor(name, size, chunks)


def _piece(place: Mapping[str, Any], directory: Path) -> Piece:
    name = place["relative_path"]
    if not _FILE.fullmatch(name) or place.get("transform_descriptors"):
        raise ValueError(f"a chunk lies in {name[:80]!r}, or is compressed")
    first, length = _numbers([place["offset"], place["length"]])
    return Piece(directory / name, first, length)


def _pairs(value: Any) -> list[Any]:
    """Return the pairs of a mapping with any keys."""
    if isinstance(value, Opaque) and value.name == MAPPING:
        return list(value.arguments)
    return list(value.items())


def _numbers(values: Any) -> tuple[int, ...]:
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values!r:.80} are no whole numbers")
    return tuple(values)
