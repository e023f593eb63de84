"""The manifest of a checkpoint: which files belong to it, and which piece of which tensor lies where.

Owns: its entries and its JSON form with its own checksum. `index.py` puts the entries of all ranks together.
The format is described in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from megalm.checkpoint.blocks import DAMAGED, FileRecord, open_regular, unreadable
from megalm.checkpoint.geometry import Piece
from megalm.checkpoint.names import FILE_NAME, MANIFEST, STATE, file_name, parse_file_name
from megalm.checkpoint.tensor_file import DTYPES
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError, DamagedCheckpoint

FORMAT, VERSION = "megalm-checkpoint", 4
MANIFEST_LIMIT_BYTES = 4 << 30
KIND = re.compile(r"[A-Za-z0-9_.-]+")
_TAIL = re.compile(rb'\n"checksum": "([0-9a-f]{64})"\n}\n\Z')


@dataclass(frozen=True, slots=True)
class Entry:
    """A piece of the tensor (kind, name) and the file that holds it under `key`; or a run of pieces.

    A run is `piece` cut into pieces of `size` elements (0: it is one piece), of which the last one may have fewer. The
    first is in `file`, each further one in the file of that part whose rank is `stride` above the one before.
    """

    kind: str
    dtype: str
    file: str
    piece: Piece
    size: int = 0
    stride: int = 0

    @property
    def key(self) -> str:
        """The tensor's name inside its safetensors file."""
        return f"{self.piece.shard.name}/{self.kind}/{self.piece.shard.start}/{self.piece.start}"

    @property
    def count(self) -> int:
        """The number of pieces."""
        return -(-(self.piece.stop - self.piece.start) // self.size) if self.size else 1

    def pieces(self, begin: int = 0, end: int | None = None) -> Iterator[Entry]:
        """Yield the pieces one by one: those that may have some of elements [begin, end) (None: all) of the tensor."""
        if not self.size:
            yield self
            return
        start, stop, shard = self.piece.start, self.piece.stop, self.piece.shard
        rank, part = parse_file_name(self.file)
        first = max(0, self.piece.local(begin) - start) // self.size
        last = self.count if end is None else min(self.count, -(-(self.piece.local(end) - start) // self.size))
        for index in range(first, last):
            at = start + index * self.size
            piece = Piece(shard, at, min(at + self.size, stop))
            yield Entry(self.kind, self.dtype, file_name(rank + index * self.stride, part), piece)

    def followed_by(self, other: Entry) -> Entry | None:
        """Return this one and `other`, of the same tensor, as one run; None where they are none."""
        one, two = self.piece, other.piece
        size = self.size or one.stop - one.start
        if one.shard != two.shard or one.stop != two.start or not size or (one.stop - one.start) % size:
            return None
        if other.size != size if other.size else not 0 < two.stop - two.start <= size:
            return None
        (rank, part), (other_rank, other_part) = parse_file_name(self.file), parse_file_name(other.file)
        stride = self.stride or other.stride or other_rank - rank
        if part != other_part or stride <= 0 or other_rank - rank != self.count * stride:
            return None
        if other.size and other.stride != stride:
            return None
        return replace(self, piece=Piece(one.shard, one.start, two.stop), size=size, stride=stride)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        shard = self.piece.shard
        return {
            "kind": self.kind,
            "name": shard.name,
            "dtype": self.dtype,
            "shape": list(shard.global_shape),
            "file": self.file,
            "local_shape": list(shard.local_shape),
            "dim": shard.dim,
            "start": shard.start,
            "length": shard.length,
            "flat": [self.piece.start, self.piece.stop, *([self.size, self.stride] if self.size else [])],
            **({} if shard.first_expert is None else {"first_expert": shard.first_expert}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Entry:
        """Return the entry that `to_json` wrote. Raises KeyError, TypeError or ValueError."""
        shape, local, dim = tuple(value["shape"]), tuple(value["local_shape"]), value["dim"]
        first_expert = value.get("first_expert")
        shard = ShardSpec(value["name"], shape, local, dim, value["start"], value["length"], first_expert=first_expert)
        start, stop, *run = value["flat"]
        numbers = [shard.start, shard.length, *value["flat"], *([] if first_expert is None else [first_expert])]
        if not all(type(number) is int for number in numbers) or (run and (len(run) != 2 or min(run) < 1)):
            raise ValueError(f"a piece at {str(numbers)[:200]}")
        problem = piece_problem(shard, start, stop)
        if problem or value["dtype"] not in DTYPES or not FILE_NAME.fullmatch(value["file"]):
            raise ValueError(problem or f"dtype {value['dtype']!r}, file {value['file']!r}")
        return cls(value["kind"], value["dtype"], value["file"], Piece(shard, start, stop), *run)


def piece_problem(shard: ShardSpec, start: int, stop: int) -> str | None:
    """Return what is wrong with a shard and a flat range of it, or None."""
    shape, local, dim, first = shard.global_shape, shard.local_shape, shard.dim, shard.first_expert
    if not all(type(size) is int and size >= 0 for size in (*shape, *local)):
        return f"shapes {shape} and {local} are not all counts"
    if max(prod(shape), prod(local)) >= 1 << 63:
        return f"shapes {shape} and {local} have more elements than a tensor may"
    if dim is None:
        fits = shape == local and first is None
    else:
        at = 0 if first is None else 1  # dims before it are experts, of which any range may be held
        fits = 0 <= dim < len(shape) == len(local)
        fits = fits and shape[at:dim] == local[at:dim] and shape[dim + 1 :] == local[dim + 1 :]
        fits = fits and (first is None or (dim > 0 and 0 <= first <= shape[0] - local[0]))
        fits = fits and 0 <= shard.length <= local[dim] and 0 <= shard.start <= shape[dim] - shard.length
    if not fits:
        where = f"dim {dim}, start {shard.start}, length {shard.length}"
        where += "" if first is None else f", experts from {first} on"
        return f"local shape {local} ({where}) is no part of {shape}"
    if not 0 <= start <= stop <= prod(local):
        return f"flat range {start}:{stop} is outside of the {prod(local)} elements of local shape {local}"
    return None


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. Entries, by (kind, tensor name), stay JSON values until asked for."""

    step: int
    layout: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    tensors: Mapping[tuple[str, str], list[dict[str, Any]]] = field(repr=False)

    def entries(self, kind: str, name: str) -> list[Entry]:
        """Return the pieces and runs of one tensor. Raises KeyError where there is none, and ValueError."""
        found = [Entry.from_json(value) for value in self.tensors[kind, name]]
        for entry in found:
            if entry.count > len(self.files):
                raise ValueError(f"a run of {entry.count} pieces in {len(self.files)} files")
        return found

    def encode(self) -> bytes:
        """Return the text of `manifest.json`: a line a file and a tensor, then the checksum of all that."""
        lines = {
            "format": json.dumps(FORMAT),
            "version": json.dumps(VERSION),
            "step": json.dumps(self.step),
            "layout": json.dumps(self.layout, sort_keys=True),
            "files": _lines(record.to_json() for _, record in sorted(self.files.items())),
            "tensors": _lines(_group(rows) for _, rows in sorted(self.tensors.items())),
        }
        text = "{" + "".join(f'\n"{key}": {value},' for key, value in lines.items())
        body = text.encode()
        return body + f'\n"checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check `directory/manifest.json`. Raises CheckpointError."""
        path = directory / MANIFEST
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MANIFEST_LIMIT_BYTES:
                    raise DamagedCheckpoint(f"{path}: {size} bytes, more than a manifest has; {DAMAGED}")
                data = file.read()
        except OSError as error:
            raise unreadable(path, error) from error
        tail = _TAIL.search(data[-96:])
        if tail is None:
            raise DamagedCheckpoint(f"{path}: does not end with a checksum; {DAMAGED}")
        body = memoryview(data)[: len(data) - (tail.end() - tail.start())]
        if hashlib.sha256(body).hexdigest().encode() != tail[1]:
            raise DamagedCheckpoint(f"{path}: its checksum is not that of its text; {DAMAGED}")
        try:
            return cls._from_json(path, json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpoint(f"{path}: not a manifest ({type(error).__name__}: {error}); {DAMAGED}") from error

    @classmethod
    def _from_json(cls, path: Path, value: Mapping[str, Any]) -> Manifest:
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}")
        version = value["version"]
        if type(version) is not int or not 1 <= version <= VERSION:
            known = f"this program reads versions 1 to {VERSION}"
            raise CheckpointError(
                f"{path}: format version {version}, {known}; use the megalm that wrote it, or a newer one"
            )
        files = {row[2]: FileRecord.from_json(row) for row in value["files"]}
        for name in files:
            if name != STATE and not FILE_NAME.fullmatch(name):
                raise ValueError(f"file name {name!r}")
        tensors = {(group["kind"], group["name"]): _ungroup(group) for group in value["tensors"]}
        return cls(value["step"], value["layout"], files, tensors)


def _lines(values: Iterable[Any]) -> str:
    return "[" + ",".join("\n  " + json.dumps(value, separators=(",", ":")) for value in values) + "]"


_SHARED = ("kind", "name", "dtype", "shape")
_OWN = ("file", "local_shape", "dim", "start", "length", "flat")
_OF_EXPERTS = (*_OWN, "first_expert")


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{key: rows[0][key] for key in _SHARED},
        "pieces": [[row[key] for key in _OF_EXPERTS if key in row] for row in rows],
    }


def _ungroup(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    shared = {key: group[key] for key in _SHARED}
    names = {len(_OWN): _OWN, len(_OF_EXPERTS): _OF_EXPERTS}
    if not group["pieces"]:
        raise ValueError(f"no pieces of {group['name']}")
    return [{**shared, **dict(zip(names[len(piece)], piece, strict=True))} for piece in group["pieces"]]
