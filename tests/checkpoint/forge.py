"""Manifests that an attacker or another program would write, with every checksum right.

The one place in the tests, beside `regions.py`, that knows how a manifest is written down.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.checkpoint.names import MANIFEST


def parsed(directory: Path) -> dict[str, Any]:
    """Return a manifest's values, without its checksum."""
    values: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
    del values["checksum"]
    return values


def seal(directory: Path, body: str | bytes) -> None:
    """Write a manifest of the text `body`, which lacks the last key and brace, with the checksum that belongs to it."""
    data = body.encode() if isinstance(body, str) else body
    (directory / MANIFEST).write_bytes(data + f'\n"checksum": "{hashlib.sha256(data).hexdigest()}"\n}}\n'.encode())


def body_of(values: Mapping[str, Any]) -> str:
    """Return the text of a manifest up to its checksum, a line a key."""
    return "{" + "".join(f"\n{json.dumps(key)}: {json.dumps(value)}," for key, value in values.items())


def reseal(directory: Path, more: Mapping[str, Any] | None = None) -> None:
    """Give the manifest the sizes and SHA-256 of the files as they are now, and other values of some keys.

    Files have that of all their bytes, as in version 1: whoever forges a file need not count its blocks.
    """
    values = parsed(directory)
    values["files"] = [_record(directory, row) for row in values["files"]]
    seal(directory, body_of({**values, **(more or {})}))


def _record(directory: Path, row: list[Any]) -> list[Any]:
    _, _, name, *_ = row
    path = directory / name
    if not path.is_file():
        return row
    data = path.read_bytes()
    return [hashlib.sha256(data).hexdigest(), len(data), name]
