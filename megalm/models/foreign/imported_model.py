"""What a reader of another program's checkpoint hands over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.config.model import ModelSection
from megalm.distributed.sharding import Fragment


@dataclass(frozen=True)
class ForeignModel:
    """A model as recipe and tensors. Nothing of the latter is read before it is asked for."""

    model: ModelSection
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Whole tensors by our names, one by one."""
    facts: Mapping[str, Any]
    """Of what it was, as JSON values: format, iteration, ..."""
    step: int = 0
    """Updates that were made."""
    precision: str = "fp32"
    optimizer: Callable[[], Iterator[Fragment]] = field(default=lambda: iter(()))
    """The states of AdamW, where the format has them as whole tensors."""


def latest(directory: Path, pointer: str) -> str | None:
    """Return the word in a file that names the newest checkpoint, None where there is no such file."""
    path = directory / pointer
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(200).decode("utf-8", "replace").strip()
