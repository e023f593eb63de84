"""What differs between two checkpoints, of any two layouts: `megalm checkpoint diff`.

Owns: the comparison, whole tensor by whole tensor, a few megabytes of each at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.tensor_file import DTYPES
from megalm.distributed.sharding import ShardSpec

PART_BYTES = 32 << 20
ABSENT = "(absent)"


@dataclass
class _Largest:
    """The largest difference seen so far and the tensor that it was in."""

    value: float = 0.0
    name: str | None = None

    def see(self, value: float, name: str) -> None:
        if value > self.value:
            self.value, self.name = value, name


@dataclass
class _Kind:
    """The tensors of one kind that both or one have."""

    equal: int = 0
    different: list[str] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    unlike: dict[str, list[str]] = field(default_factory=dict)
    absolute: _Largest = field(default_factory=_Largest)
    relative: _Largest = field(default_factory=_Largest)

    @property
    def is_equal(self) -> bool:
        return not (self.different or self.only_first or self.only_second or self.unlike)

    def to_json(self) -> dict[str, Any]:
        lists = {
            "different": self.different,
            "only in the first": self.only_first,
            "only in the second": self.only_second,
            "other shape or dtype": self.unlike,
        }
        found: dict[str, Any] = {"equal": self.equal, **{key: value for key, value in lists.items() if value}}
        for key, largest in (("largest absolute", self.absolute), ("largest relative", self.relative)):
            if largest.name is not None:
                value = largest.value if math.isfinite(largest.value) else str(largest.value)  # as JSON has no others
                found[key] = {"value": value, "tensor": largest.name}
        return found


def difference(first: CheckpointReader, second: CheckpointReader) -> dict[str, Any]:
    """Return what differs: `equal`, `config` and `state` (keys with both values), `tensors` by kind.

    They are equal if all tensors are, to the bit, and all of the state but its config, which says where and how a run
    is computed too. Differences are relative to the larger magnitude; a NaN or an infinity on one side alone counts as
    the largest. All that is compared is verified. Raises CheckpointError.
    """
    state = _differing(first.state, second.state)
    config = {key.removeprefix("config."): pair for key, pair in state.items() if key.startswith("config.")}
    state = {key: pair for key, pair in state.items() if not key.startswith("config.")}
    kinds = {kind: _kind(first, second, kind) for kind in sorted({*first.kinds(), *second.kinds()})}
    return {
        "first": str(first.directory),
        "second": str(second.directory),
        "equal": not state and all(kind.is_equal for kind in kinds.values()),
        "config": config,
        "state": state,
        "tensors": {name: kind.to_json() for name, kind in kinds.items()},
    }


def _differing(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the dotted keys whose values differ, with both; JSON's NaN is equal to itself."""
    one, two = dict(_leaves("", first)), dict(_leaves("", second))
    pairs = {key: [one.get(key, ABSENT), two.get(key, ABSENT)] for key in {**one, **two}}
    return {key: pair for key, pair in pairs.items() if repr(pair[0]) != repr(pair[1])}


def _leaves(prefix: str, value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _leaves(f"{prefix}{key}.", item)
        else:
            yield prefix + key, item


def _kind(first: CheckpointReader, second: CheckpointReader, kind: str) -> _Kind:
    one, two = first.names(kind), second.names(kind)
    found = _Kind(only_first=sorted({*one} - {*two}), only_second=sorted({*two} - {*one}))
    for name in sorted({*one} & {*two}):
        looks = [_look(reader, kind, name) for reader in (first, second)]
        if looks[0] != looks[1]:
            found.unlike[name] = [f"{dtype} {list(shape)}" for dtype, shape in looks]
        elif _compare(first, second, kind, name, found):
            found.equal += 1
        else:
            found.different.append(name)
    return found


def _look(reader: CheckpointReader, kind: str, name: str) -> tuple[str, tuple[int, ...]]:
    row = reader.manifest.tensors[kind, name][0]
    return row["dtype"], tuple(row["shape"])


def _compare(first: CheckpointReader, second: CheckpointReader, kind: str, name: str, found: _Kind) -> bool:
    """Return whether a tensor is equal in both, to the bit; note how far from each other its elements are."""
    dtype, shape = _look(first, kind, name)
    spec, step, equal = ShardSpec.whole(name, shape), PART_BYTES // DTYPES[dtype].itemsize, True
    for start in range(0, prod(shape), step):
        stop = min(start + step, prod(shape))
        a, b = (reader.read_flat(spec, kind, start, stop) for reader in (first, second))
        if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        equal = False
        absolute, relative = _largest(a, b)
        found.absolute.see(absolute, name)
        found.relative.see(relative, name)
    return equal


def _largest(a: Tensor, b: Tensor) -> tuple[float, float]:
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    absolute = torch.where(same, 0.0, (a - b).abs())
    absolute = torch.where(absolute.isnan(), math.inf, absolute)
    larger = torch.maximum(a.abs(), b.abs())
    relative = torch.where(same, 0.0, torch.where(absolute.isinf(), math.inf, absolute / larger))
    return float(absolute.max()), float(relative.max())
