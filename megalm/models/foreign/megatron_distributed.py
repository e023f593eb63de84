"""Checkpoints of Megatron-LM in the format `torch_dist`, that of torch.distributed.checkpoint.

    DIR/iter_0001000/.metadata, common.pt, __0_0.distcp, ...

`.metadata` is a pickle that says which chunk of which tensor lies where; a chunk is a file of torch.save inside a
.distcp file. Tensors stand there as those of the whole model, the layers of older versions stacked in a first dim, and
so does what Adam keeps, in the formats that keep it by parameter (not `dp_reshardable`): `optimizer.state.KIND.NAME`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError
from megalm.models.foreign.assembly import Assembly, rows_of, section_of
from megalm.models.foreign.imported_model import ForeignModel
from megalm.models.foreign.megatron import arguments, facts_of, precision_of, vocabulary
from megalm.models.foreign.megatron_arguments import model_of, zero_centered
from megalm.models.foreign.names import Place, is_no_weight, place_of
from megalm.models.foreign.torch_file import MAPPING, Opaque, Piece, StoredTensor, read_file, read_files

INDEX = ".metadata"
MASTERS, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")
_STATE = re.compile(r"optimizer\.state\.([a-z0-9_]+)\.(.+)")
_STACKED = re.compile(r"(.*\blayers)\.([a-z_].*)")
_MOST_DIMS = 8
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

    @property
    def dtype(self) -> torch.dtype:
        """That of all its chunks."""
        return next(iter(self.chunks.values())).dtype

    def read(self) -> Tensor:
        """Return the whole, or its one layer."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        for (begin, length), stored in self.chunks.items():
            if self.layer is not None and not begin[0] <= self.layer < begin[0] + length[0]:
                continue
            values = stored.read()
            if self.layer is not None:
                values, begin = values[self.layer - begin[0]], begin[1:]
            whole[tuple(slice(at, at + count) for at, count in zip(begin, values.shape, strict=True))] = values
        return whole


def find_chunks(tensors: Iterable[ChunkedTensor]) -> None:
    """Find each chunk's numbers in its file. Raises CheckpointError where one is not what the index says."""
    wanted = [(tensor, region, piece) for tensor in tensors for region, piece in tensor.places.items()]
    for (tensor, region, piece), stored in zip(wanted, read_files([item[2] for item in wanted]), strict=True):
        if not isinstance(stored, StoredTensor) or stored.shape != region[1]:
            raise CheckpointError(f"{piece.path}: a chunk of {tensor.name} is no tensor of {list(region[1])}")
        tensor.chunks[region] = stored
        if stored.dtype != tensor.dtype:
            raise CheckpointError(f"{piece.path}: {tensor.name} has chunks of {stored.dtype} and of {tensor.dtype}")


def read_distributed(directory: Path, vocab: int | None = None) -> ForeignModel:
    """Return the model of an iteration's directory, with what Adam keeps where it is kept by parameter.

    Raises CheckpointError for what a recipe cannot express, and where tensors are missing or left over.
    """
    common = read_file(directory / "common.pt")
    common = common if isinstance(common, dict) else {}
    given = arguments(common.get("args"), str(directory / "common.pt"))
    section = model_of(given, str(directory))
    held = _by_kind(_index(directory))
    if not all(kind in held for kind in MOMENTS):
        held = {kind: tensors for kind, tensors in held.items() if kind not in MOMENTS}
    if MASTERS in held:
        held.pop("", None)
    find_chunks(chain.from_iterable(tensors.values() for tensors in held.values()))  # so all that is counted is there
    kinds = {kind: list(_placed(tensors, section["layers"], directory)) for kind, tensors in held.items()}
    weights = kinds.get(MASTERS) or kinds.get("", [])
    rows = rows_of(str(directory), ((place, [tensor]) for _, _, place, tensor in weights))
    section["vocab"] = vocabulary(rows, vocab, str(directory))
    model = section_of(section, str(directory))
    assembly = _assembly(weights, directory, model, zero_centered(given))
    moments = [(kind, _assembly(kinds[kind], directory, model, False)) for kind in MOMENTS if kind in kinds]
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


def _by_kind(tensors: Mapping[str, ChunkedTensor]) -> dict[str, dict[str, ChunkedTensor]]:
    """Return the tensors that may be taken by the kind of state ("": weights) and their names without it."""
    kinds: dict[str, dict[str, ChunkedTensor]] = {}
    for source, tensor in tensors.items():
        state = _STATE.fullmatch(source)
        kind, name = (state[1], state[2]) if state else ("", source)
        if is_no_weight(name) or kind not in ("", MASTERS, *MOMENTS):
            continue
        if not name.startswith(("optimizer.", "rng_state", "rerun_state")):
            kinds.setdefault(kind, {})[name] = tensor
    return kinds


def _placed(tensors: Mapping[str, ChunkedTensor], layers: int, directory: Path) -> Iterator[_Found]:
    """Yield the tensors of one kind with their places, stacked layers one by one."""
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name)
        if stacked and (tensor.size[:1] != (layers,) or prod(tensor.size) == 0):  # of nothing there may be any number
            held = f"holds {tensor.name} {list(tensor.size)}"
            raise CheckpointError(f"{directory}: {held}, its arguments describe {layers} layers")
        for layer in range(layers) if stacked else (None,):
            place = place_of(f"{stacked[1]}.{layer}.{stacked[2]}" if stacked else name)
            if place is None:
                raise CheckpointError(
                    f"{directory}: holds {tensor.name} {list(tensor.size)}, which a recipe has no tensor for"
                )
            yield tensor.name, *place, tensor if layer is None else replace(tensor, layer=layer)


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
        if not chunks or len(size) > _MOST_DIMS or not _tile(size, chunks):
            raise ValueError(f"the chunks of {name} are not the whole of it, each element once")
        yield name, ChunkedTensor(name, size, chunks)


def _tile(size: tuple[int, ...], chunks: Iterable[Region]) -> bool:
    """Return whether each element of a tensor is in exactly one chunk.

    Each box is told by its corners, with the sign of the number of sides at which it ends there: their sum is the
    derivative, in every dim, of how many boxes hold an element, and that of the whole must be all of it.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for one, (begin, length) in chain([(-1, ((0,) * len(size), size))], ((1, chunk) for chunk in chunks)):
        for ends in product((0, 1), repeat=len(size)):
            corner = tuple(at + end * count for at, end, count in zip(begin, ends, length, strict=True))
            corners[corner] += one * (-1) ** sum(ends)
    return not any(corners.values())


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
