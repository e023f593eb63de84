"""A small valid recipe in YAML, to which the tests of the config add their mistakes."""

from __future__ import annotations

from pathlib import Path

SMALL = """\
model:
  layers: 4
  hidden: 48
  heads: 12
  sequence: 16
train:
  steps: 10
  global_batch: 12
  micro_batch: 2
optim:
  lr: 1e-3
"""


def write_recipe(folder: Path, text: str = SMALL, name: str = "recipe.yaml") -> str:
    """Write a recipe and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)
