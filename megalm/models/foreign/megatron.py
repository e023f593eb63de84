"""Checkpoints of Megatron-LM in the format `torch`: one file for each tensor and pipeline rank.

    DIR/latest_checkpointed_iteration.txt                       a number, or "release"
    DIR/iter_0001000/mp_rank_TT/model_optim_rng.pt              without pipeline stages
    DIR/iter_0001000/mp_rank_TT_PPP/model_optim_rng.pt          with them

A file holds `args` (an argparse.Namespace), `iteration`, `checkpoint_version` and `model`, or `model0`, `model1`, ...
with virtual stages; layers count from 0 in each. What Adam keeps stands there without names, in an order that depends
on version and options, so it is not taken: weights alone are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from megalm.errors import CheckpointError
from megalm.models.foreign.assembly import Assembly, rows_of, section_of
from megalm.models.foreign.imported_model import ForeignModel, latest
from megalm.models.foreign.megatron_arguments import model_of, zero_centered
from megalm.models.foreign.names import Place, is_no_weight, place_of
from megalm.models.foreign.torch_file import Opaque, Piece, StoredTensor, read_files

TRACKER = "latest_checkpointed_iteration.txt"
FILES = ("model_optim_rng.pt", "model_rng.pt")
_RANK = re.compile(r"mp_rank_([0-9]{2,4})(?:_([0-9]{3,4}))?(?:_([0-9]{3,4}))?")
_OLDEST = 2.0  # before, the rows of the fused projection had another order


def iteration_directory(directory: Path) -> Path | None:
    """Return the directory of the newest checkpoint below, or `directory` itself if it is one; None: there is none."""
    word = latest(directory, TRACKER)
    if word is not None:
        if not re.fullmatch(r"[0-9]{1,12}|release", word):
            raise CheckpointError(
                f"{directory / TRACKER}: {word[:40]!r} is no iteration; name a directory iter_... below"
            )
        found = directory / (word if word == "release" else f"iter_{int(word):07d}")
        if not found.is_dir():
            raise CheckpointError(f"{found}: is not there, though {TRACKER} names it; name another directory iter_...")
        return found
    return directory if directory.is_dir() and any(directory.glob("mp_rank_*")) else None


def read_megatron(directory: Path, vocab: int | None = None) -> ForeignModel:
    """Return the model of an iteration's directory; `vocab` leaves out rows of the vocabulary beyond.

    Raises CheckpointError for what a recipe cannot express, and where tensors are missing or left over.
    """
    ranks = _grid(directory)
    contents = dict(zip(ranks, read_files([Piece(path) for path in ranks.values()]), strict=True))
    first = contents[0, 0]
    if not isinstance(first, dict):
        raise CheckpointError(f"{ranks[0, 0]}: holds no mapping; name a checkpoint of Megatron-LM")
    given = arguments(first.get("args"), str(ranks[0, 0]))
    _check_grid(ranks, given, directory)
    version = first.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _OLDEST:
        raise CheckpointError(
            f"{directory}: is of checkpoint version {version}, whose fused projections are laid out in another order; "
            "load it with a newer Megatron-LM and save it again"
        )
    section = model_of(given, str(directory))
    tensors = _merged({rank: _chunks(contents[rank], ranks[rank]) for rank in ranks}, section["layers"], directory)
    padded = rows_of(str(directory), ((place, parts) for _, place, parts in tensors.values()))
    section["vocab"] = vocabulary(padded, vocab, str(directory))
    assembly = Assembly(str(directory), section_of(section, str(directory)), zero_centered(given))
    for (layer, _), (source, place, parts) in tensors.items():
        assembly.add(source, layer, place, parts)
    assembly.check()
    step = first.get("iteration")
    step = step if type(step) is int and step >= 0 else 0
    facts = facts_of(given, "Megatron-LM", step, padded)
    return ForeignModel(assembly.model, assembly.tensors, facts, step, precision_of(given))


def _grid(directory: Path) -> dict[tuple[int, int], Path]:
    """Return the file of each tensor rank and stage."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        file = next((path / name for name in FILES if (path / name).exists()), None)
        if match is None or file is None:
            raise CheckpointError(f"{path}: is no rank's directory with {FILES[0]} in it; name a directory iter_...")
        if match[3] is not None:
            raise CheckpointError(f"{path}: is of a model with experts, which cannot be imported from this format")
        found[int(match[1]), int(match[2] or 0)] = file
    if (0, 0) not in found:
        raise CheckpointError(f"{directory}: has no mp_rank_00; name a directory iter_... of Megatron-LM")
    return found


def _check_grid(ranks: Mapping[tuple[int, int], Path], given: Mapping[str, Any], directory: Path) -> None:
    sizes = [given.get(f"{axis}_model_parallel_size") or 1 for axis in ("tensor", "pipeline")]
    if not all(type(size) is int and 1 <= size <= 100_000 for size in sizes):
        raise CheckpointError(f"{directory}: its arguments have {sizes} tensor and pipeline ranks")
    expected = product(range(sizes[0]), range(sizes[1]))  # not made a set: there may be any number
    missing = next((rank for rank in expected if rank not in ranks), None)
    if missing is None and sizes[0] * sizes[1] != len(ranks):
        missing = next(rank for rank in sorted(ranks) if rank[0] >= sizes[0] or rank[1] >= sizes[1])
    if missing is not None:
        raise CheckpointError(
            f"{directory}: is of {sizes[0]} tensor and {sizes[1]} pipeline ranks, but has {len(ranks)} directories "
            f"(first to differ: tensor rank {missing[0]}, stage {missing[1]}); copy the missing ones there"
        )


def _chunks(contents: Any, path: Path) -> list[dict[str, StoredTensor]]:
    """Return the tensors of each chunk of layers that one rank holds, by their whole names."""
    held = contents if isinstance(contents, dict) else {}
    keys = ["model"] if "model" in held else [f"model{n}" for n in range(len(held)) if f"model{n}" in held]
    if not keys:
        raise CheckpointError(f"{path}: holds no model; name a checkpoint of Megatron-LM")
    return [dict(_flat(held[key], path)) for key in keys]


def _flat(value: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yield tensors of nested mappings under names joined by dots."""
    if isinstance(value, StoredTensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not is_no_weight(str(key)) and key != "_metadata":
                yield from _flat(item, path, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, Opaque):
        raise CheckpointError(f"{path}: {prefix} is no tensor but {value.name}, which cannot be imported")


def _merged(
    chunks: Mapping[tuple[int, int], list[dict[str, StoredTensor]]], layers: int, directory: Path
) -> dict[tuple[int | None, str], tuple[str, Place, list[StoredTensor]]]:
    """Return, by layer of the whole model and our name, a tensor's name there, its place, and its tensor ranks' parts.

    Layers lie in the order of chunks, and in each in that of stages.
    """
    tensor_ranks = 1 + max(rank for rank, _ in chunks)
    stages = 1 + max(stage for _, stage in chunks)
    found: dict[tuple[int | None, str], tuple[str, Place, list[StoredTensor]]] = {}
    before = 0
    for chunk in range(max(map(len, chunks.values()))):
        for stage in range(stages):
            held = [chunks[rank, stage][chunk : chunk + 1] for rank in range(tensor_ranks)]
            alike = [part[0] for part in held if part]
            if len(alike) < tensor_ranks or any(part.keys() != alike[0].keys() for part in alike):
                raise CheckpointError(f"{directory}: the tensor ranks of stage {stage} hold different tensors")
            own = set[int]()
            for source in alike[0]:
                place = place_of(source)
                if place is None:
                    raise CheckpointError(f"{directory}: holds {source}, which a recipe has no tensor for")
                layer = None if place[0] is None else before + place[0]
                if place[0] is not None:
                    own.add(place[0])
                if (layer, place[1].name) in found and layer is not None:
                    raise CheckpointError(f"{directory}: holds {source} of stage {stage} twice")
                found[layer, place[1].name] = (source, place[1], [part[source] for part in alike])
            if own != set(range(len(own))):
                raise CheckpointError(f"{directory}: the layers of stage {stage} are not counted from 0")
            before += len(own)
    if before != layers:
        raise CheckpointError(f"{directory}: holds {before} layers, its arguments describe {layers}")
    return found


def arguments(value: Any, path: str) -> Mapping[str, Any]:
    """Return the arguments as a mapping. Raises CheckpointError where they are none."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f"{path}: holds no arguments; a checkpoint without them cannot be imported")
    return value


def vocabulary(padded: int, wanted: int | None, path: str) -> int:
    """Return the tokens of the vocabulary: as many as are wanted, else all rows, padding included."""
    if wanted is not None and wanted > padded:
        raise CheckpointError(f"{path}: has {padded} rows of tokens, fewer than --vocab={wanted}; give fewer")
    return padded if wanted is None else wanted


def precision_of(given: Mapping[str, Any]) -> str:
    """Return the precision in which it was trained."""
    return "bf16" if given.get("bf16") else "fp16" if given.get("fp16") else "fp32"


def facts_of(given: Mapping[str, Any], program: str, step: int, padded: int) -> dict[str, Any]:
    """Return what is noted of where a model comes from."""
    names = (
        "consumed_train_samples",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "global_batch_size",
    )
    numbers = {name: given[name] for name in (*names, "tokenizer_type") if isinstance(given.get(name), int | str)}
    return {"program": program, "iteration": step, "rows_of_vocabulary": padded, **numbers}
