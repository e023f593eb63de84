"""The storage table of a recipe against what ranks hold, and gradients reduced in a chosen format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.cli import main
from megalm.config.deepspeed_files import find_config, read_config
from megalm.config.storage import BYTES, stored
from megalm.train.monitor import count_parameters
from tests.parity.harness import VOCAB, Case, run_case
from tests.worker_pool import WorkerPool

DATA = 4
SHAPE = {"model.hidden": 64, "model.layers": 4}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_table_says_what_a_rank_holds(pool: WorkerPool, stage: int, precision: str) -> None:
    check_table(pool, {"zero.stage": stage, "precision": precision, "optim.ema_decay": 0.9})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_table_knows_narrow_states(pool: WorkerPool, stage: int) -> None:
    chosen = {"zero.stage": stage, "precision": "bf16", "optim.ema_decay": 0.9}
    check_table(pool, {**chosen, "optim.state_dtype": "bf16"})
    if stage == 0:
        check_table(pool, {**chosen, "optim.kind": "adamw8bit"})


def check_table(pool: WorkerPool, chosen: dict[str, Any]) -> None:
    case = Case(1, DATA, 1, {**SHAPE, **chosen})
    stage = case.config().zero.stage
    _, reports = run_case(pool, case, 2)
    _, whole = run_case(pool, Case(overrides={**SHAPE, "zero.stage": 0}), 1, precision="fp32")
    parameters = whole[0].held_bytes["weights"] / BYTES["fp32"]
    expected = dict.fromkeys(reports[0].held_bytes, 0.0)
    for row in stored(case.config()):
        if row.group:
            expected[row.group] += parameters * BYTES[row.dtype] / (DATA if stage >= row.from_stage else 1)
    for report in reports:
        assert report.held_bytes == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_muon_keeps_one_number_of_hidden_matrices_and_two_of_the_rest_and_zero_divides_both(
    pool: WorkerPool, stage: int
) -> None:
    case = Case(1, DATA, 1, {**SHAPE, "zero.stage": stage, "optim.kind": "muon"})
    model = case.config().model
    hidden, every = sum(model.hidden_matrices.values()), count_parameters(model, VOCAB).total
    _, reports = run_case(pool, case, 2, precision="fp32")
    expected = 4.0 * (hidden + 2 * (every - hidden)) / (DATA if stage else 1)
    for report in reports:
        assert report.held_bytes["optimizer"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_table_knows_what_a_deepspeed_json_saves(pool: WorkerPool, stage: int, tmp_path: Path) -> None:
    content = read_config(find_config("low-memory-bf16"))
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 1  # or all weights here would be kept whole
    file = tmp_path / "low-memory-bf16.json"
    file.write_text(json.dumps(content))
    check_table(pool, {"zero.stage": stage, "zero.config": str(file), "precision": "bf16"})


def test_the_table_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    layout = ["zero.stage=2", "parallel.tensor=2", "precision=bf16", "optim.kind=lion", "train.reduce_dtype=bf16"]
    assert main(["config", "show", "gpt-tiny", "--storage", *layout]) == 0
    rows = {line[:28].strip(): line[28:].split(maxsplit=2) for line in capfd.readouterr().out.splitlines()}
    assert rows["weights"] == ["bf16", "2", "tensor"]
    assert rows["gradients, summed"] == rows["optimizer: exp_avg"] == ["fp32", "4", "tensor, data"]
    assert rows["gradients between replicas"] == ["bf16", "2", "tensor"]
    assert "optimizer: exp_avg_sq" not in rows


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_rounded_to_the_format_in_which_they_are_reduced(pool: WorkerPool, stage: int) -> None:
    """bf16 keeps 8 bits, so a sum of two ranks' gradients is off by some 2^-9; in fp32 by some 2^-24."""
    errors: dict[str | None, float] = {}
    for dtype in ("bf16", "fp32", None):
        overrides: dict[str, Any] = {"zero.stage": stage, "train.reduce_dtype": dtype}
        difference, _ = run_case(pool, Case(1, 2, 2, overrides), 1, precision="fp32")
        errors[dtype] = difference.gradient
    assert 3e-4 < errors["bf16"] < 6e-3
    assert errors["fp32"] < 1e-5 and errors[None] < 1e-5
