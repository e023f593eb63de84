"""The kernel benchmark: who is refused, what a pass costs at least, which goals are met, and that the program runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_race
import pytest
import torch
from kernel_cases import OPERATIONS, Call, Case, Inputs, cases
from kernel_goals import goals
from kernel_race import run_case
from peers import OURS, PEERS, Peer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RATES = {"copy_bytes_s": 4.3e12, "product_flop_s": 790e12}
"""Those of an H200."""
SWIGLU = Case("SwiGLU", "swiglu", {"N": 4, "F": 8})


def plain(case: Case) -> Call:
    return case.operation.plain(case.sizes)


def blind_to_gate(case: Case) -> Call:
    def call(x: Inputs) -> torch.Tensor:
        return plain(case)({"gate": x["gate"].detach(), "up": x["up"]}) + 0.0 * x["gate"]

    return call


def not_installed(case: Case) -> Call:
    raise ModuleNotFoundError("No module named 'liger_kernel'")


def broken(case: Case) -> Call:
    def call(x: Inputs) -> torch.Tensor:
        raise RuntimeError("no such\narchitecture")

    return call


def test_who_is_wrong_or_missing_is_listed_with_the_reason_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    who = {
        "right": Peer(plain),
        "scaled": Peer(lambda case: lambda x: 1.2 * plain(case)(x)),
        "blind": Peer(blind_to_gate),
        "absent": Peer(not_installed),
        "broken": Peer(broken),
        "at once": Peer(plain, passes=("backward",)),
    }
    monkeypatch.setattr(kernel_race, "contestants", lambda case, device: who)
    result = run_case(SWIGLU, CPU, RATES, rounds=3)
    assert list(result["passes"]["forward"]["contestants"]) == ["right"]
    assert set(result["passes"]["backward"]["contestants"]) == {"right", "at once"}
    assert result["passes"]["forward"]["contestants"]["right"]["samples"] == 3
    missing = result["missing"]
    assert re.match(r"wrong: out0 is off by (19|20)\.", missing["scaled"])
    assert missing["blind"] == "wrong: d_gate is off by 100.0%"
    assert missing["absent"] == "ModuleNotFoundError: No module named 'liger_kernel'"
    assert missing["broken"] == "RuntimeError: no such architecture"


def test_the_floors_are_those_of_the_goals() -> None:
    def floor_us(name: str, pass_name: str) -> float:
        (case,) = (case for case in cases(small=False) if case.name == name)
        flops, moved = case.operation.cost(case.sizes)[pass_name]
        return 1e6 * max(flops / RATES["product_flop_s"], moved / RATES["copy_bytes_s"])

    wanted = {
        ("attention D128 T=8192", "forward"): 696,
        ("attention D128 T=8192", "backward"): 1740,
        ("causal softmax", "forward"): 187,
        ("causal softmax", "backward"): 250,
        ("LayerNorm", "forward"): 62,
        ("RMSNorm", "backward"): 94,
        ("RMSNorm with residual", "forward"): 125,
        ("LayerNorm with residual", "backward"): 125,
        ("cross-entropy", "both"): 977,
        ("linear cross-entropy", "both"): 32_700,
        ("rotary", "forward"): 78,
        ("SwiGLU", "forward"): 328,
        ("SwiGLU", "backward"): 546,
        ("AdamW bf16 with masters", "forward"): 6_500,
    }
    assert {key: floor_us(*key) for key in wanted} == pytest.approx(wanted, rel=0.01)


def test_every_case_has_its_operation_and_every_peer_its_operation() -> None:
    for small in (True, False):
        listed = cases(small)
        assert len({case.name for case in listed}) == len(listed)
        assert {case.op for case in listed} == set(OPERATIONS)
    assert set(PEERS) <= set(OPERATIONS)


def results(measurement: bool, share: float) -> dict[str, Any]:
    ours = {"median_us": 10.0, "of_floor": share}
    passes = {"forward": {"contestants": {OURS: ours, "Liger": {"median_us": 20.0}}}}
    return {"measurement": measurement, "cases": {"SwiGLU": {"passes": passes}}}


@pytest.mark.parametrize(
    ("measurement", "share", "met"), [(True, 0.93, True), (True, 0.91, False), (False, 0.93, None)]
)
def test_a_goal_is_judged_by_what_was_measured(measurement: bool, share: float, met: bool | None) -> None:
    (goal,) = (goal for goal in goals() if goal.text.startswith("SwiGLU forward"))
    assert goal.judged(results(measurement, share))["met"] is met


def test_a_goal_whose_figure_is_absent_is_not_judged_and_says_what_is_missing() -> None:
    (goal,) = (goal for goal in goals() if goal.text.startswith("SwiGLU backward"))
    judged = goal.judged(results(True, 0.93))
    assert judged["met"] is None
    assert "this run has no of_floor of megalm in SwiGLU, backward" in judged["line"]


@pytest.mark.slow
def test_the_program_runs_on_a_cpu_and_says_that_it_measures_nothing(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("device cpu: small sizes that try the program; no time here means anything")
    written = json.loads(out.read_text("utf-8"))
    assert written["measurement"] is False
    assert {goal["met"] for goal in written["goals"]} == {None}
    assert set(written["cases"]) == {case.name for case in cases(small=True)}
    for name, case in written["cases"].items():
        assert case["missing"] == {}, name
        for figures in case["passes"].values():
            assert set(figures["contestants"]) == {OURS, "torch"}, name
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
