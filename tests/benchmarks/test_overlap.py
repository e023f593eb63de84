"""The benchmark of overlap, made tiny: every case is a recipe, and a run ends in figures and a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import overlap
import overlap_process
import pytest


def test_each_case_differs_in_its_switch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--quick", "--device=cpu"])
    options = overlap.read_options()
    for name, (_, on, _) in overlap.CASES.items():
        shared = overlap.settings(name, options)
        sides = [
            overlap_process.recipe({**shared, **keys}).model_dump()
            for keys in (on, {key: value for key, value in overlap.OFF.items() if key in on})
        ]
        switches = [side.pop("overlap") for side in sides]
        assert sides[0] == sides[1]
        assert {f"overlap.{key}" for key in switches[0] if switches[0][key] != switches[1][key]} == set(on)


def test_a_run_gives_figures_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "overlap"
    cases = ["gradients", "tensor_chunks, sequence parallel", "messages"]
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--quick", "--device=cpu", "--cases", *cases, f"--out={out}"])
    assert overlap.main() == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert list(result["measured"]) == cases
    for one in result["measured"].values():
        low, high = one["quartiles"]
        assert 0.0 < low <= one["ratio"] <= high
        assert 0.0 < one["on_waiting"] < 1.0 and 0.0 < one["off_waiting"] < 1.0
    printed = capsys.readouterr().out
    assert overlap.table(result["measured"], 2) in printed and "| messages | 2 pipeline |" in printed


def test_products_and_links_may_be_slept_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of 1 MB/s takes 0.1 s for the gradients, of which the rank that sums them at the end waits for all."""
    out = tmp_path / "slept"
    speeds = ["--slept", "--megabytes=1", "--gflops=1"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["overlap.py", "--quick", "--device=cpu", "--cases", "gradients", "messages", *speeds, f"--out={out}"],
    )
    assert overlap.main() == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["slept"] == {"gflop_s": 1.0, "mb_s": 1.0} and list(result["measured"]) == ["gradients"]
    one = result["measured"]["gradients"]
    assert one["off_waiting"] * one["off_step_s"] > 0.1 and one["on_step_s"] > 0.1


def test_the_ratio_is_that_of_pairs() -> None:
    raw = {"on": [[1.0, 0.1], [4.0, 0.2], [3.0, 0.3]], "off": [[2.0, 0.5], [2.0, 0.5], [3.0, 0.4]]}
    found = overlap.row({**raw, "loss_difference": 0.0})
    assert (found["ratio"], found["quartiles"]) == (1.0, [0.75, 1.5])
    assert (found["on_step_s"], found["off_step_s"], found["on_waiting"], found["off_waiting"]) == (3.0, 2.0, 0.2, 0.5)


def test_a_side_by_side_is_of_all_ranks_on_one_axis() -> None:
    options = argparse.Namespace(
        ranks=4, layers=4, hidden=32, heads=4, sequence=16, vocab=64, micro_batch=2, microbatches=3, precision="fp32",
        device="cpu",
    )  # fmt: skip
    data, pipeline = overlap.settings("gradients", options), overlap.settings("messages", options)
    assert data["train.global_batch"] == 24 and "parallel.tensor" not in data
    assert pipeline["train.global_batch"] == 6 and pipeline["parallel.pipeline"] == 4
