"""The benchmark of checkpoints: times become rates and ratios, and a run of one rank loads what it saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import checkpoint
import pytest


def test_times_become_rates_and_ratios_of_the_same_repetition() -> None:
    jobs = [job for row in checkpoint.ROWS.values() for job in row if job]
    seconds = {job: [(2.0, 1.0), (4.0, 1.0), (8.0, 1.0)] for job in jobs}
    seconds["save"] = [(4.0, 1.0), (4.0, 1.0), (4.0, 3.0)]
    seconds["load"] = [(2.2, 1.0), (4.4, 1.0), (8.8, 1.0)]
    found = checkpoint.rows({"bytes": 8e9, "seconds": seconds})
    assert found["save"]["megalm_gb_s"] == 2.0 and found["save"]["disk_gb_s"] == 2.0
    assert found["save"]["of_disk"] == [1.0, 0.75, 1.5]
    assert found["save"]["cpu_s_per_gb"] == 0.125
    assert found["load"]["verification"][0] == pytest.approx(0.1)
    assert found["stall"].keys() == {"cpu_s_per_gb", "megalm_gb_s"}
    lines = checkpoint.table({"4": {"rows": found}}).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "| save | 4 | 2.00 GB/s | 2.00 GB/s |" in lines[2] and "+10.0%" in lines[-1]


def test_a_run_measures_every_job_and_checks_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "checkpoint"
    options = ["--ranks=1", "--megabytes=1", "--hidden=64", "--repetitions=1", f"--root={tmp_path}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *options])
    assert checkpoint.main() == 0
    measured = json.loads(out.with_suffix(".json").read_text())["measured"]["1"]
    assert measured["rows"].keys() == checkpoint.ROWS.keys()
    assert measured["bytes"] == 2 * 4 * 3 * 64 * (12 * 64 + 1), "matrices and a vector of two layers, with two states"
    assert "load into columns" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left on the disk"
