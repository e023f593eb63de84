"""Which parts a checkpoint's files have, found in the bytes themselves: what a fuzzer draws its places from."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Region(NamedTuple):
    """Bytes [start, stop) of a file, by the name of what they are."""

    name: str
    start: int
    stop: int


def regions_of(path: Path) -> list[Region]:
    """Return regions that cover the file, each at least a byte, of a tensor file, of JSON or YAML text; else one."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        found = _of_tensor_file(data)
        kind = "weights" if "weight" in path.name else "optimizer"
    elif path.suffix in (".json", ".yaml"):
        found, kind = _of_text(data), path.name
    else:
        found, kind = [Region("all", 0, len(data))], path.name
    assert sum(region.stop - region.start for region in found) == len(data), path
    return [Region(f"{kind}: {name}", start, stop) for name, start, stop in found if stop > start]


def _of_tensor_file(data: bytes) -> list[Region]:
    """Length, header, its padding, each tensor, and what lies between and behind tensors."""
    base = 8 + int.from_bytes(data[:8], "little")
    text_end = len(data[:base].rstrip(b" "))
    found = [Region("header length", 0, 8), Region("header", 8, text_end), Region("header padding", text_end, base)]
    header = json.loads(data[8:text_end])
    spans = sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
    at = base
    for start, stop in spans:
        found += [Region("padding", at, base + start), Region("payload", base + start, base + stop)]
        at = base + stop
    return [*found, Region("behind the payload", at, len(data))]


def _of_text(data: bytes) -> list[Region]:
    """A region each for the outermost keys, and one for what stands before the first."""
    keys = [(len(m[1]), m.start(), m[2]) for m in re.finditer(rb'^( *)"?(\w+)"?: ?', data, re.MULTILINE)]
    outermost = min((indent for indent, _, _ in keys), default=0)
    starts = [(start, name.decode()) for indent, start, name in keys if indent == outermost]
    edges = [(0, "opening"), *starts, (len(data), "")]
    return [Region(name, start, stop) for (start, name), (stop, _) in pairwise(edges)]
