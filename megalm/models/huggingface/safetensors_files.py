"""The safetensors files of a model's directory, from anyone: headers checked before use, reads by byte ranges.

Nothing in them is trusted: sizes, names, dtypes, shapes and offsets are bounded by what the files really hold, links
and paths that lead elsewhere are refused, and no other format is opened: pickles run what they say. What the tensors
mean is `mapping`'s.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint.blocks import open_regular, read_exactly, read_into
from megalm.checkpoint.tensor_file import DTYPES, HEADER_LIMIT_BYTES, as_bytes
from megalm.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_LIMIT_BYTES = 64 << 20
MOST_TENSORS = 1_000_000
MOST_FILES = 10_000
BLOCK_BYTES = 8 << 20  # read at once for short runs: the bound on extra memory
DIRECT_BYTES = 64 << 10  # runs at least this long are read straight into place
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: where its bytes begin, counted from the file's start."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model's directory by name; only headers are read. Raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no directory; give one with config.json and *.safetensors")
    index = directory / INDEX
    if _there(index):
        return _indexed(directory, index)
    if not _there(directory / SINGLE):
        _no_safetensors(directory)
    return read_header(directory / SINGLE)


def _no_safetensors(directory: Path) -> NoReturn:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory}: only {pickles[0]}, a pickle, which may run any program when it is opened; take the model's "
            "safetensors, or convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW)"
        )
    raise CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX}; give a model's directory")


def _there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _indexed(directory: Path, index: Path) -> dict[str, StoredTensor]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or len(found) > MOST_TENSORS:
        raise CheckpointError(f"{index}: weight_map is no list of 1 to {MOST_TENSORS} tensors; take the file anew")
    names = {file for file in found.values() if isinstance(file, str) and _FILE.fullmatch(file)}
    wrong = [file for file in found.values() if not isinstance(file, str) or file not in names]
    if wrong or len(names) > MOST_FILES:
        shown = f"{wrong[0]!r}"[:80] if wrong else f"{len(names)} files"
        raise CheckpointError(f"{index}: {shown} is not the name of a file beside it; take the file anew")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(names):
        held = read_header(directory / name)
        listed = {tensor for tensor, file in found.items() if file == name}
        if held.keys() != listed:
            odd = sorted(held.keys() ^ listed)[0]
            raise CheckpointError(f"{directory / name}: {odd!r:.80} is in the file or in {INDEX}, not in both")
        tensors |= held
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most 64 MiB, each of its keys once. Raises CheckpointError."""
    return parse_object(read_bounded(path, JSON_LIMIT_BYTES), path)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return what is in a file, which is no link and not larger. Raises CheckpointError."""
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most_bytes:
                raise CheckpointError(f"{path}: {size} bytes, at most {most_bytes} are read")
            return read_exactly(file.fileno(), path, 0, size)
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object of a text, each of its keys once. Raises CheckpointError naming `path`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error)[:100]}); take the file anew") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a {type(value).__name__}, not an object; take the file anew")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _open(path: Path) -> Any:
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: a symbolic link, which is not followed; copy the files themselves (cp -rL, or a download with "
            "--local-dir)"
        )
    return open_regular(path)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot read: {error.strerror or error}; check the path and its permissions")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name. Raises CheckpointError for what does not add up."""
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT_BYTES):
                raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}; take the file anew")
            text = read_exactly(file.fileno(), path, 8, length)
    except OSError as error:
        raise _unreadable(path, error) from error
    header = parse_object(text, path)
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors; at most {MOST_TENSORS} are read")
    tensors = {name: _stored(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, prod(item[1].shape))):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: {name!r:.80} begins at byte {tensor.offset}, not {end}; take the file anew")
        end += prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        raise CheckpointError(f"{path}: its tensors end at byte {end}, the file has {size}; take the file anew")
    return tensors


def _stored(path: Path, name: str, value: Any, base: int) -> StoredTensor:
    problem = "is no description of a tensor"
    if isinstance(value, Mapping):
        shape, offsets = value.get("shape"), value.get("data_offsets")
        dtype = DTYPES.get(str(value.get("dtype")))
        if dtype is None:
            problem = f"has dtype {value.get('dtype')!r:.40}"
        elif _counts(shape, 8) and _counts(offsets, 2) and len(offsets) == 2:
            if offsets[1] - offsets[0] == prod(shape) * dtype.itemsize:
                return StoredTensor(path, base + offsets[0], tuple(shape), dtype)
            problem = f"of shape {shape} has bytes {offsets}"
    raise CheckpointError(f"{path}: {name!r:.80} {problem}; take the file anew")


def _counts(value: Any, most: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 2**48 for n in value)


def read_view(stored: StoredTensor, view: Tensor) -> Tensor:
    """Return the numbers of a strided view of a stored tensor: a new tensor of its shape, not always contiguous.

    `view` (on the meta device) says which by its offset, shape and strides. Only the bytes of these are read, and
    short gaps between them. Raises CheckpointError.
    """
    shape, strides, width = tuple(view.shape), view.stride(), stored.dtype.itemsize
    order = sorted(range(len(shape)), key=lambda dim: -strides[dim])  # as the file has them
    inner = len(order)
    run = 1
    while inner > 0 and (shape[order[inner - 1]] == 1 or strides[order[inner - 1]] == run):
        inner -= 1
        run *= shape[order[inner]]
    offsets = np.full(1, view.storage_offset(), np.int64)
    for dim in order[:inner]:
        offsets = (offsets[:, None] + np.arange(shape[dim], dtype=np.int64) * strides[dim]).reshape(-1)
    out = torch.empty(len(offsets), run, dtype=stored.dtype)
    if out.numel():
        try:
            with _open(stored.file) as file:
                _read_runs(file.fileno(), stored.file, stored.offset + offsets * width, as_bytes(out), run * width)
        except OSError as error:
            raise _unreadable(stored.file, error) from error
    inverse = [order.index(dim) for dim in range(len(shape))]
    return out.view([shape[dim] for dim in order]).permute(inverse)


def _read_runs(descriptor: int, path: Path, offsets: Any, out: Any, run: int) -> None:
    """Read runs of `run` bytes at ascending offsets one after the other; short ones in blocks with their gaps."""
    rows = out.reshape(len(offsets), run)
    first = 0
    while first < len(offsets):
        last = first + 1
        if run < DIRECT_BYTES:
            last = int(np.searchsorted(offsets, offsets[first] + BLOCK_BYTES - run, side="right"))
        span = int(offsets[last - 1] - offsets[first]) + run
        if last - first > 1 and span <= 4 * (last - first) * run:
            block = np.empty(span, np.uint8)
            read_into(descriptor, path, int(offsets[first]), block)
            windows = np.lib.stride_tricks.sliding_window_view(block, run)
            rows[first:last] = windows[offsets[first:last] - offsets[first]]
        else:
            for index in range(first, last):
                read_into(descriptor, path, int(offsets[index]), rows[index])
        first = last
