"""What a run's checkpoint has: all that a resumed run, or somebody with nothing but the checkpoint, needs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from megalm.checkpoint.manifest import VERSION, Manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.cli import main
from megalm.config.load import load_resolved, load_values
from megalm.data.datasets import open_prepared
from megalm.train.trainer import TrainState
from tests.end_to_end.workplace import make_workplace


def test_a_checkpoint_holds_everything_that_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workplace(tmp_path / "work"))
    overrides = ["precision=fp16", "optim.ema_decay=0.9", "train.steps=2", "run.device=cpu", "run.preflight=false"]
    assert main(["train", "recipe.yaml", *overrides]) == 0
    path = Path("run/checkpoints/step-00000002")
    reader = CheckpointReader(path)
    assert Manifest.load(path).step == reader.step == 2
    assert (path / "manifest.json").read_text().splitlines()[2] == f'"version": {VERSION},'

    assert reader.kinds() == ["ema", "exp_avg", "exp_avg_sq", "weight"]
    names = reader.names("weight")
    for kind in reader.kinds():
        assert reader.names(kind) == names
        rows = [row for name in names for row in reader.manifest.tensors[kind, name]]
        assert {row["dtype"] for row in rows} == {"F32"}, (
            "weights are the master weights, of which fp16 ones are rounded"
        )

    progress = reader.state["progress"]
    assert {field.name for field in fields(TrainState)} <= progress.keys()
    assert (progress["step"], progress["samples"], progress["tokens"]) == (2, 8, 8 * 16)
    assert progress["loss_scale"] > 1 and progress["clean_steps"] + 2 * progress["skipped"] >= 2

    config = load_values(reader.state["config"], "state.json")
    assert config == load_resolved(Path("run")), "schedule, seeds and all"
    assert config.seed == 7 and config.lr_schedule.kind and config.optim.ema_decay == 0.9
    data = open_prepared("data")
    assert reader.state["data_fingerprint"] == data.fingerprint
    assert reader.state["tokenizer_fingerprint"] == data.tokenizer_fingerprint
    assert reader.layout["tensor"] == 1 and reader.layout["zero_stage"] == 0
