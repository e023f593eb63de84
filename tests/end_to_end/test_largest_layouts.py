"""Eight processes train fifty steps in the layouts with the most axes: quietly, alike, and in memory that stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalm.train.metrics_file import read_events, read_metrics
from tests.end_to_end.workplace import make_workplace, megalm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SIZES = ("model.layers=4", "model.hidden=32", "model.heads=4", "model.sequence=32", "model.vocab=4096", "optim.lr=1e-3")
BATCH = ("train.steps=50", "train.global_batch=16", "train.micro_batch=4", "checkpoint.every=20", "evaluate.every=25")
EXPERTS = ("model.experts=4", "model.expert_ffn=32", "model.capacity_factor=1.5")
LAYOUTS = {
    "t2 p2 d2": ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "zero.stage=1"),
    "t2 c2 e2": ("parallel.tensor=2", "parallel.context=2", "parallel.expert=2", "zero.stage=2", *EXPERTS),
}
GROWTH_BYTES = 24 << 20
"""Of the fullest rank, from step 20 to step 50. Logits of a microbatch are 1 MiB on a rank."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_processes_train_fifty_steps_without_a_warning(layout: str, tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    done = megalm(place, "train", "recipe.yaml", "--nproc=8", *SIZES, *BATCH, *LAYOUTS[layout], timeout_s=600)
    assert done.returncode == 0, done.stderr
    run = place / "run"
    said = [done.stdout, done.stderr, *(path.read_text() for path in sorted((run / "logs").iterdir()))]
    assert not [line for text in said for line in text.splitlines() if re.search("warn|deprecat", line, re.IGNORECASE)]
    assert not done.stderr and not read_events(run / "metrics.jsonl")
    steps = [record for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in steps] == [*range(1, 51)]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.5
    assert steps[-1]["memory/peak_bytes"] - steps[19]["memory/peak_bytes"] < GROWTH_BYTES
    table = [line.split("\t") for line in (run / "rank_memory.tsv").read_text().splitlines()]
    assert table[0][:5] == ["step", "rank", "stage", "peak_bytes", "weights_bytes"]
    assert [row[:2] for row in table[1:]] == [["50", str(rank)] for rank in range(8)]
    assert max(int(row[3]) for row in table[1:]) >= steps[-1]["memory/peak_bytes"]
    assert all(int(row[3]) >= sum(map(int, row[4:])) for row in table[1:]), "parts are of the peak"
