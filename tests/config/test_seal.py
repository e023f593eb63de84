"""The checksum in front of a recipe that a program wrote: any damage is seen, a file of one's own needs none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megalm.config.yaml_text import read, sealed
from megalm.errors import ConfigError

TEXT = "seed: 1\nmodel:\n  layers: 12\n"


def test_a_sealed_file_reads_as_the_text_does(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(sealed(TEXT))
    assert read(path) == {"seed": 1, "model": {"layers": 12}}


def test_every_flipped_bit_and_every_cut_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    whole = sealed(TEXT).encode()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert _refused(path) or _is_true_or_has_an_unknown_key(read(path))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert _refused(path), length


def _is_true_or_has_an_unknown_key(recipe: Mapping[str, Any]) -> bool:
    """Tell what a recipe's sections would take: without its "#" the first line is a key, which they refuse."""
    return recipe == {"seed": 1, "model": {"layers": 12}} or bool(recipe.keys() - {"seed", "model"})


def _refused(path: Path) -> bool:
    try:
        read(path)
    except ConfigError as error:
        return str(path) in str(error) and "\n" not in str(error)
    return False


def test_the_error_tells_who_changed_the_file_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(sealed(TEXT).replace("12", "13"))
    with pytest.raises(ConfigError, match=r"config.yaml: .*SHA-256.*; restore it .* or take that line out"):
        read(path)
