"""`megalm export-hf`: a run's weights become a Hugging Face directory, tensor by tensor.

Owns the choice of the family and the files; `checking` compares what was written. A directory appears by a rename,
once it is whole, on the disk, and found to give the same logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.tensor_file import BLOCK_BYTES, DTYPE_NAMES, as_bytes
from megalm.config.model import ModelSection
from megalm.config.trained import trained_config
from megalm.data.tokenizer import FILE_NAME, Tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.models.build import DTYPES
from megalm.models.huggingface.checking import check_logits, require_transformers
from megalm.models.huggingface.companions import written_companions
from megalm.models.huggingface.configs import differences
from megalm.models.huggingface.families import FAMILIES, Family
from megalm.models.huggingface.mapping import Bound, Part, bind
from megalm.models.huggingface.safetensors_files import INDEX, SINGLE
from megalm.models.imported import SOURCE_FILE, new_directory, require_free
from megalm.models.trained import load_checkpoint

SHARD_BYTES = 5_000_000_000  # of one file, as the peers have it; a tensor that is larger has a file of its own
_ALONE = ("run.device=cpu", "model.kernels=reference")


@dataclass(frozen=True)
class Theirs:
    """One tensor to be written: its name and shape, and the parts of ours that fill it."""

    name: str
    shape: tuple[int, ...]
    bound: Bound
    parts: tuple[Part, ...]


def export_model(
    run: Path,
    out: Path,
    averaged: bool = False,
    dtype: str | None = None,
    family: str | None = None,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the newest weights of a run (`averaged`: their average) as a Hugging Face directory `out`.

    `dtype` is that of the files (None: the recipe's precision), `family` the model_type to be written (None: one that
    fits), `step` that of the checkpoint (None: the newest). Keys of the result: out, family, step, weights, dtype,
    rounded (tensors that lost bits, as they were stored in a wider dtype), parameters, files, largest_difference,
    tolerance. Raises ConfigError for a model that the family cannot express, naming what it is, CheckpointError for
    numbers that are not finite in the dtype, and where the written model differs.
    """
    require_free(out)
    require_transformers()
    config = trained_config(run, _ALONE)
    kinds = ("weight", "ema") if averaged else ("weight",)
    reader = load_checkpoint(run, step, lambda reader: reader.verify_files(reader.files(*kinds)))
    tokenizer = Tokenizer.load(run) if (run / FILE_NAME).exists() else None
    vocab = config.model.vocab or (0 if tokenizer is None else tokenizer.vocabulary)
    chosen, values = choose(config.model, vocab, _imported_from(run), family)
    dtype = dtype or config.precision
    with closing(reader), new_directory(out) as (files, partial):
        tensors = list(theirs(chosen, config.model, vocab))
        names, rounded = write_weights(files, partial, tensors, reader, averaged, DTYPES[dtype], shard_bytes)
        tokens, extras = written_companions(run, tokenizer, config.model.sequence)
        if tokenizer is not None:
            extras[FILE_NAME] = tokenizer.serialized
        # The older of two words for the dtype, which every version reads.
        extras["config.json"] = _json({**values, **tokens, "torch_dtype": _torch_name(dtype)})
        for name, text in extras.items():
            files.write_file(partial / name, text)
        found = check_logits(partial, config, vocab, reader, averaged, DTYPES[dtype])
    return {
        "out": str(out),
        "family": chosen.name,
        "step": reader.step,
        "weights": "averaged" if averaged else "last",
        "dtype": dtype,
        "rounded": _listed(rounded),
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "files": len(names),
        **found,
    }


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def _torch_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _imported_from(run: Path) -> str | None:
    """Return the model_type that a run was imported from, so that it leaves as what it came."""
    try:
        source = json.loads((run / SOURCE_FILE).read_text(encoding="utf-8"))
        return str(source["model_type"]) if source["model_type"] in FAMILIES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose(
    model: ModelSection, vocab: int, imported: str | None, asked: str | None = None
) -> tuple[Family, dict[str, Any]]:
    """Return the first family that expresses a model, that which it was `imported` as first, and its config.json.

    `asked` is the only one that is tried. Raises ConfigError where none does, naming what the nearest one lacks.
    """
    order = [FAMILIES[name] for name in (asked or imported,) if name]
    order += [] if asked else [family for family in FAMILIES.values() if family.model_type != imported]
    lacks: dict[str, list[str]] = {}
    refusals: dict[str, str] = {}
    for family in order:
        values = family.config(model, vocab)
        try:
            found = differences(model.model_copy(update={"vocab": vocab}), family.section(values, "its config.json"))
        except ConfigError as error:
            refusals[family.name] = str(error)
            continue
        if not found:
            return family, values
        lacks[family.name] = found
    others = "another --family, or none, may have it" if asked else "megalm evaluate and generate take the run as it is"
    if not lacks:
        nearest, reason = next(iter(refusals.items()))
        raise ConfigError(f"{nearest} is no family for this model: {reason}; {others}")
    nearest = order[0].name if order[0].name in lacks and imported else min(lacks, key=lambda name: len(lacks[name]))
    if asked:
        raise ConfigError(f"--family={asked}: {nearest} has no {', '.join(lacks[nearest])}; {others}")
    named = ", ".join(lacks[nearest])
    raise ConfigError(f"no family of transformers that megalm writes has {named} ({nearest} has all else); {others}")


def theirs(family: Family, model: ModelSection, vocab: int) -> Iterator[Theirs]:
    """Yield the tensors to be written, in the order of the model."""
    for bound in bind(family.rows, model, vocab).values():
        for index, (name, shape) in enumerate(zip(bound.names, bound.layout.theirs, strict=True)):
            yield Theirs(name, shape, bound, tuple(part for part in bound.layout.parts if part.index == index))


def write_weights(
    files: FileSystem,
    directory: Path,
    tensors: list[Theirs],
    reader: CheckpointReader,
    averaged: bool,
    dtype: torch.dtype,
    shard_bytes: int,
) -> tuple[list[str], list[str]]:
    """Write the safetensors files and their index; return their names, and those of the tensors that were rounded.

    Raises OSError and CheckpointError.
    """
    with_average = set(reader.names("ema")) if averaged else set()
    if averaged and not with_average:
        raise CheckpointError(f"{reader.directory}: no averaged weights; train with optim.ema_decay, or without --ema")
    groups: list[list[Theirs]] = []
    room = 0
    for tensor in tensors:
        size = prod(tensor.shape) * dtype.itemsize
        if size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= size
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    weight_map: dict[str, str] = {}
    rounded: list[str] = []
    for name, group in zip(names, groups, strict=True):
        rounded += _write_file(files, directory / name, group, reader, with_average, dtype)
        weight_map |= {tensor.name: name for tensor in group}
    if count > 1:
        total = sum(prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_file(directory / INDEX, _json(index))
    return names, rounded


def _write_file(
    files: FileSystem,
    path: Path,
    tensors: list[Theirs],
    reader: CheckpointReader,
    with_average: set[str],
    dtype: torch.dtype,
) -> list[str]:
    """Write one file, and return the names of the tensors that were rounded."""
    rounded: list[str] = []
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    descriptor = files.create(path)
    try:
        files.write(descriptor, len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            kind = "ema" if tensor.bound.spec.name in with_average else "weight"
            values, exact = read_theirs(reader, tensor, kind).reshape(-1), True
            for block in torch.split(values, BLOCK_BYTES // dtype.itemsize):
                cast = block.to(dtype)
                _require_finite(tensor.name, block, cast)
                exact = exact and torch.equal(cast.to(block.dtype), block)
                files.write(descriptor, as_bytes(cast).data)
            rounded += [] if exact else [tensor.name]
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    return rounded


def _require_finite(name: str, values: Tensor, cast: Tensor) -> None:
    """Raise CheckpointError where numbers are not finite, as those are none that transformers could agree upon."""
    if bool(cast.isfinite().all()):
        return
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{name} holds numbers that are not finite; export an earlier checkpoint (--step)")
    largest, word = float(values.abs().max()), next(word for word, dtype in DTYPES.items() if dtype == cast.dtype)
    raise CheckpointError(
        f"{name} holds {largest:.3g}, too large for --dtype={word}; give --dtype=bf16 or --dtype=fp32"
    )


def read_theirs(reader: CheckpointReader, tensor: Theirs, kind: str) -> Tensor:
    """Return one of their tensors; of ours the range is read from its first number to its last."""
    layout, out = tensor.bound.layout, None
    strides = [prod(layout.shape[dim + 1 :]) for dim in range(len(layout.shape))]
    for part in tensor.parts:
        sizes = part.view.shape
        low = sum(at * stride for at, stride in zip(part.at, strides, strict=True))
        high = low + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
        flat = reader.read_flat(tensor.bound.spec, kind, low, high)
        if out is None:
            out = torch.empty(tensor.shape, dtype=flat.dtype)
        place = out.as_strided(sizes, part.view.stride(), part.view.storage_offset())
        place.copy_(flat.as_strided(sizes, strides))
    assert out is not None, tensor.name
    return out
