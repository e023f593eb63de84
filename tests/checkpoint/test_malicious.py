"""Checkpoints that attackers made are refused by a line, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint import malicious
from tests.checkpoint.malicious import CASES, WEIGHTS, Case, try_case


def test_malicious_checkpoints_do_no_harm(tmp_path: Path) -> None:
    assert len(CASES) >= 50 and len({case.name for case in CASES}) == len(CASES)
    found = {case.name: try_case(case, tmp_path / str(number)) for number, case in enumerate(CASES)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def nothing(checkpoint: Path) -> None:
    """Leave the checkpoint as it is."""


def test_what_is_read_without_a_word_is_found_out(tmp_path: Path) -> None:
    assert try_case(Case("nothing", WEIGHTS, nothing), tmp_path) == ["was read without a word"]


def test_what_takes_memory_or_writes_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(checkpoint: Path, check: bool) -> None:
        bytearray(1 << 30)

    monkeypatch.setattr(malicious, "_read", take)
    assert any("MemoryError" in line for line in try_case(Case("nothing", "", nothing), tmp_path / "memory"))

    def write(checkpoint: Path, check: bool) -> None:
        malicious._mark(checkpoint).mkdir(exist_ok=True)

    monkeypatch.setattr(malicious, "_read", write)
    assert any("was written" in line for line in try_case(Case("nothing", "", nothing), tmp_path / "written"))
