"""The pipeline benchmark, made tiny: figures beside the simulator's, a table and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pipeline
import pytest


def test_a_run_gives_figures_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "bubbles"
    sizes = ["--stages=2", "--rounds", "1", "2", "--repeats=2", "--forward=0.05", "--input=0.05", "--weight=0.05"]
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *sizes, "--schedules", "1f1b", "zb-v", f"--out={out}"])
    monkeypatch.setattr(pipeline, "GOAL", 1.0)  # here nothing is measured that depends on what else the machine does
    assert pipeline.main() == 0
    result = json.loads(out.with_suffix(".json").read_text())
    rows = result["measured"]["2"]
    assert set(rows) == {"1f1b", "zb-v"} and set(rows["zb-v"]) == {"2", "4"}
    for counts in rows.values():
        for row in counts.values():
            assert row["step_s"] >= row["simulated"]["step_s"]  # waits are never shorter than they are told to be
            assert row["bubble"] > 0.0 and row["fastest_step_s"] <= row["step_s"] <= row["slowest_step_s"]
    assert rows["1f1b"]["2"]["bubble"] > 0.25
    printed = capsys.readouterr().out
    assert "| 2 | 4 | zb-v |" in printed and "furthest from the simulator" in printed
    assert out.with_suffix(".png").stat().st_size > 5_000


def test_the_simulators_figures_are_of_whole_stages() -> None:
    times = {"forward": 1.0, "input": 1.0, "weight": 1.0}
    options = argparse.Namespace(virtual_stages=2, times=times)
    assert pipeline.simulated("1f1b", 4, 8, options) == {"step_s": 33.0, "bubble": pytest.approx(9 / 33), "peak": 4.0}
    assert pipeline.simulated("zb-v", 4, 8, options)["step_s"] == 25.5
    assert pipeline.simulated("interleaved", 4, 8, options)["peak"] == 11 / 2
