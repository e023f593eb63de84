"""Hugging Face directories of random weights, made without transformers: by the tables, and byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.models.huggingface.families import FAMILIES
from megalm.models.huggingface.mapping import bind
from tests.models.huggingface.families import CONFIGS

SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def values_of(name: str) -> dict[str, Any]:
    """Return the config.json of one of `CONFIGS`."""
    kind, values = CONFIGS[name]
    return {"model_type": kind, **values}


def tensors_of(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return random tensors by the names that a model of a config.json has."""
    family = FAMILIES[values["model_type"]]
    model = ModelSection.model_validate(family.section(values, "config.json"))
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator)
        for bound in bind(family.rows, model, model.vocab or 0).values()
        for name, shape in zip(bound.names, bound.layout.theirs, strict=True)
    }


def make(directory: Path, values: dict[str, Any] = SMALL, **changes: Tensor | None) -> Path:
    """Write a directory whose tensors are random, but for `changes` (None: left out), and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {**tensors_of(values), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def raw(header: Any, payload: bytes = b"") -> bytes:
    """Return a safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload
