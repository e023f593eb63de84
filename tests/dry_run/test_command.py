"""`megalm train --dry-run` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import megalm.zero.deepspeed_engine  # noqa: F401 - DeepSpeed then tries a linker, which writes past what is captured
from megalm.cli import main

LARGE = ("train", "llama-405b", "--dry-run", "200/16384", "train.global_batch=256", "parallel.partition=null")
SMALLER = ("model.layers=32", "model.heads=64", "model.kv_heads=8", "model.hidden=8192", "model.ffn=28672")


def answered(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    said = capfd.readouterr()
    assert said.err == ""
    return said.out


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing may be written, and no world may be left."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_a_rank_of_16384_is_described(capfd: pytest.CaptureFixture[str]) -> None:
    text = answered(capfd, *LARGE, *SMALLER)
    assert text.startswith("llama-405b, rank 200 of 16,384 (pipeline 16 x data 128 x tensor 8)\n")
    assert "pipeline 0, data 25, tensor 0: layers 0 to 1 and the embedding of 32 layers\n" in text
    assert "forward 0 to 1                sends activation, stage 1 (rank 1,224)\n" in text
    assert max(map(len, text.splitlines())) <= 110


def test_json_has_everything(capfd: pytest.CaptureFixture[str]) -> None:
    run = json.loads(answered(capfd, *LARGE, *SMALLER, "--json"))
    assert run["coordinates"] == {"pipeline": 0, "data": 25, "tensor": 0}
    assert (run["layers"], run["embeds"], run["predicts"], run["microbatches"]) == ([[0, 1]], True, False, 2)
    assert run["bubble"] == pytest.approx(15 / 17), "of 16 stages and 2 microbatches"
    (embedding,) = (row for row in run["parameters"] if row["name"] == "embedding.weight")
    assert (embedding["local_shape"], embedding["whole_shape"]) == ([16032, 8192], [128256, 8192])
    weights = sum(row["bytes"] for row in run["parameters"])
    assert weights <= run["bytes"]["weights"] < 1.001 * weights, "but for the padding of ZeRO's buffer"
    kinds = [action["action"] for action in run["actions"]]
    assert kinds == ["forward", "forward", "backward", "backward"]
    assert run["actions"][0]["sends"] == {"cargo": "activation", "stage": 1, "rank": 1224}
    # Each row has 16 bits, and every rank of the tensor axis its eighth of the tokens.
    assert run["message"]["bytes"] == 8192 * 8192 * 2 // 8
    (sent,) = (row for row in run["totals"] if row["operation"] == "send")
    assert (sent["calls"], sent["sent_bytes"]) == (2, 2 * run["message"]["bytes"])


def test_experts_are_taken_to_have_even_loads(capfd: pytest.CaptureFixture[str]) -> None:
    """Of 8,192 tokens that go to 2 of 8 experts each, a rank sends as many to each of the 8 that divide them."""
    place = ("train", "mixtral-8x7b", "--dry-run", "100/1024")
    text = answered(capfd, *place)
    assert "\nassumed: tokens go evenly to the experts\n" in text
    run = json.loads(answered(capfd, *place, "--json"))
    assert run["layout"] == {"pipeline": 4, "data": 256, "tensor": 1, "expert": 8}
    (experts,) = {tuple(p["local_shape"]) for p in run["parameters"] if p["name"].endswith("experts.down.weight")}
    assert experts == (1, 4096, 14336)
    (forward, _) = run["collectives"]["microbatch"][::-1]
    assert forward["work"] == "forward"
    assert {call["elements"] for call in forward["calls"]} == {8, 2 * 8192 * 4096}
    counts = {(row["axis"], row["operation"]): row["calls"] for row in run["totals"]}
    # Of 4 microbatches and 8 layers: the counts and there and back, as often in recomputation, two gradients.
    assert counts["expert", "all-to-all"] == 4 * 8 * (3 + 3 + 2)


def test_recompilation_is_left_out_and_kernels_are_those_of_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    """The matrix of scores is what plain torch needs more: rows x heads x tokens^2, at least once in 16 bits."""
    place = ("train", "gpt-124m", "--dry-run", "1/8", "model.layers=2", "train.compile=true", "--json")
    fused = json.loads(answered(capfd, *place))["bytes"]["activations"]
    plain = json.loads(answered(capfd, *place, "run.device=cpu"))["bytes"]["activations"]
    assert plain - fused > 16 * 12 * 1024**2 * 2


def test_what_is_offloaded_leaves_the_count_and_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    place = ("train", "llama-8b", "--dry-run", "3/8", "model.layers=16", "train.recompute=full")
    switch = "train.offload_activations=true"
    plain, ours = (json.loads(answered(capfd, *place, *more, "--json")) for more in ((), (switch,)))
    freed = plain["bytes"]["activations"] - ours["bytes"]["activations"]
    assert plain["offloaded_bytes"] == 0
    assert 0.7 * ours["offloaded_bytes"] < freed < ours["offloaded_bytes"]
    text = answered(capfd, *place, switch)
    assert "activations in the host's memory, at most" in text
    assert "offloaded" not in answered(capfd, *place)


@pytest.mark.parametrize(
    "chosen",
    [
        ("model.document_mask=true", "optim.rules=[{match: 'blocks.0.*', freeze: true}]"),
        ("model.position=t5", "model.kernels=reference", "model.dropout=0.1"),
        ("parallel.pipeline=2", "parallel.schedule=zb-v", "zero.stage=2", "train.recompute=selective"),
        ("zero.stage=3", "zero.config=zero3-offload", "loss.fused_head=true"),
        ("train.fp8=tensorwise", "parallel.pipeline=2", "parallel.schedule=zb-h1", "parallel.tensor=2"),
        ("model.experts=6", "model.capacity_factor=1.1", "parallel.expert=2", "zero.stage=2"),
    ],
    ids=str,
)
def test_other_models_run_on_shapes_too(capfd: pytest.CaptureFixture[str], chosen: tuple[str, ...]) -> None:
    text = answered(capfd, "train", "gpt-124m", "--dry-run", "3/8", "model.layers=4", *chosen)
    assert ("in the host's memory" in text) == ("zero.config=zero3-offload" in chosen)
    assert ("(frozen)" in text) == any("freeze" in word for word in chosen)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dry-run", "3"), "'3' is not RANK/WORLD, such as 0/64"),
        (("--dry-run", "-1/64"), "--dry-run has no value behind it, or one that begins with '-'"),
        (("--dry-run", "0/2000000"), "a world of 2,000,000 ranks is too large; give at most 1,048,576"),
        (("--dry-run=-1/8",), "'-1/8' is not RANK/WORLD"),
        (("--dry-run", "8/8"), "no rank 8 in a world of 8, which has ranks 0 to 7"),
        (("--dry-run", "0/0"), "a world of 0, which has no rank"),
        (("--dry-run", "0/6"), "6 ranks are not divisible by parallel.tensor=4 x parallel.pipeline=1"),
        (("--dry-run", "0/12"), "train.global_batch=1024 is not divisible"),
        (("--dry-run", "0/4", "--fresh"), "--fresh starts or changes a run and --dry-run does neither"),
        (("--dry-run", "0/4", "--nproc", "4"), "--nproc starts or changes a run"),
        (("--dry-run", "0/4", "model.vocab=null"), "no model.vocab and the data does not tell it"),
        (("--dry-run", "0/4", "optim.rules=[{match: 'nothing.*', freeze: true}]"), "nothing.*"),
        (("--json",), "--json belongs to --dry-run"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(capfd, "llama-8b", *arguments)
