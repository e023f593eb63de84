"""A new run's first weights: in every ZeRO stage, from each kind of source; a resume asks for nothing of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm import cli
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import RunConfig
from megalm.data.tokenizer import Tokenizer
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError, ConfigError
from megalm.models.huggingface.companions import companions_of
from megalm.models.huggingface.importing import import_model
from megalm.models.huggingface.reader import HuggingFaceReader
from megalm.models.sources import fingerprint
from megalm.train.pretrain import train
from megalm.train.run_directory import check_run, is_doomed
from megalm.train.run_identity import fixed_settings, read_identity
from megalm.train.start import check_start, notes, shapes_of
from tests.end_to_end.workplace import make_data
from tests.models.huggingface.plain import make, values_of
from tests.parity.harness import build_trainer
from tests.worker_pool import WorkerPool
from tests.zero.runs import held_weights, run_steps, saved

VOCAB = 67


def check_first_weights(mesh: ParallelMesh, source: Path, cells: list[dict[str, Any]]) -> None:
    """Masters are the source's numbers, weights these rounded, and a step moves them."""
    for cell in cells:
        reader = HuggingFaceReader(source)
        config = RunConfig.model_validate(
            {
                "model": {**reader.section, "attention_dropout": 0.0}, "optim": {"lr": 1e-3},
                "train": {"steps": 9, "global_batch": 4, "micro_batch": 1},
                "parallel": {"tensor": mesh.size("tensor"), "pipeline": mesh.size("pipeline")}, **cell,
            }
        )  # fmt: skip
        trainer = build_trainer(mesh, config)
        trainer.engine.load_weights(reader.read_flat)
        whole = dict(reader.tensors())
        store = saved(trainer)
        store.assert_tiled_once()
        assert {name for name, kind in store.wholes if kind == "weight"} == whole.keys(), cell
        for (name, kind), values in store.wholes.items():
            if kind == "weight":
                assert torch.equal(values, whole[name].flatten().to(values.dtype)), f"{cell} {name}"
                assert values.dtype == torch.float32
        if config.zero.stage < 3:
            for parameter in trainer.engine.module.parameters():
                part = reader.read_local(parameter.shard).to(parameter.dtype)  # type: ignore[attr-defined]
                assert torch.equal(parameter, part), cell
        before = held_weights(trainer)
        run_steps(trainer, 1)
        assert any(not torch.equal(a, b) for a, b in zip(before, held_weights(trainer), strict=True)), cell


@pytest.mark.parametrize(
    ("layout", "cells"),
    [
        (RankLayout(pipeline=2, tensor=2), [{"precision": "bf16"}, {"precision": "fp32"}]),
        (
            RankLayout(data=2, tensor=2),
            [
                {"zero": {"stage": 1}, "precision": "bf16"},
                {"zero": {"stage": 2}, "precision": "fp32"},
                {"zero": {"stage": 3}, "precision": "bf16"},
            ],
        ),
    ],
    ids=["stage 0", "stages 1 to 3"],
)
def test_masters_are_the_source_s_numbers(
    pool: WorkerPool, tmp_path: Path, layout: RankLayout, cells: list[dict[str, Any]]
) -> None:
    source = make(tmp_path / "source", values_of("llama"))
    pool.run(check_first_weights, source, cells, layout=layout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with data, a model `source` for its tokenizer, and the run `imported` made of it."""
    place = tmp_path_factory.mktemp("start")
    make_data(place / "data")
    tokenizer = Tokenizer.load(place / "data")
    values = {**values_of("llama"), "vocab_size": tokenizer.vocabulary, "num_hidden_layers": 1, "eos_token_id": 2}
    tokenizer.save(make(place / "source", values))
    (place / "source" / "chat_template.jinja").write_text("{{ messages }}")
    import_model(place / "source", place / "imported")
    return place


def recipe(place: Path, run: Path, init_from: Path | None, **model: Any) -> RunConfig:
    """Return a recipe of the imported model whose steps change nothing that fp32 shows."""
    section = {**HuggingFaceReader(place / "source").section, "sequence": 16, **model}
    return RunConfig.model_validate(
        {
            "model": section, "optim": {"lr": 1e-30, "weight_decay": 0.0}, "data": {"path": str(place / "data")},
            "train": {
                "steps": 4, "stop_at": 2, "global_batch": 4, "micro_batch": 2,
                "init_from": None if init_from is None else str(init_from),
            },
            "run": {"dir": str(run), "preflight": False, "hang_timeout_s": 0}, "checkpoint": {"every": 2},
        }
    )  # fmt: skip


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint."""
    reader = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
    shapes = shapes_of(reader)
    return {name: reader.read_local(ShardSpec.whole(name, shape), "weight") for name, shape in shapes.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two models have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["imported", "imported/checkpoints/step-00000000", "source"])
def test_a_run_starts_with_the_weights_of_its_source(place: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "copy"
    shutil.copytree(place / kind.partition("/")[0], source)
    init_from = source / kind.partition("/")[2]
    whole = dict(HuggingFaceReader(place / "source").tensors())
    run = tmp_path / "run"
    config = recipe(place, run, init_from)
    train(config)
    assert same(weights(run, 2), whole)
    identity = read_identity(run)
    assert identity is not None
    assert identity["init_from"] == {"path": str(init_from), "fingerprint": fingerprint(init_from)}
    assert json.loads((run / "companions" / "token_ids.json").read_text())["eos_token_id"] == 2
    assert (run / "companions" / "chat_template.jinja").read_text() == "{{ messages }}"
    shutil.rmtree(source)  # a resume asks for nothing of it
    train(config.model_copy(update={"train": config.train.model_copy(update={"stop_at": 4})}))
    assert same(weights(run, 4), whole)


def states(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    """Return one kind of tensors of a checkpoint, in float64."""
    reader = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
    shapes = shapes_of(reader)
    return {name: reader.read_local(ShardSpec.whole(name, shape), kind).double() for name, shape in shapes.items()}


def test_the_optimizer_goes_on_from_its_source(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same step from the same weights, with and without the source's state, differs by that state alone."""
    rate, (first, second), eps = 1e-3, (0.8, 0.9), 1e-8
    optim = {"lr": rate, "weight_decay": 0.0, "betas": [first, second], "eps": eps}

    def trained(name: str, steps: int, source: Path | None, **train_keys: Any) -> Path:
        given = recipe(place, tmp_path / name, source).model_dump()
        given["train"] |= {"steps": steps, "stop_at": None, "clip_grad_norm": None, **train_keys}
        train(
            RunConfig.model_validate({**given, "optim": optim, "lr_schedule": {"kind": "constant", "warmup_steps": 0}})
        )
        return tmp_path / name

    before = trained("source", 3, None)
    after = trained("with", 1, before, init_optimizer=True)
    anew = trained("without", 1, before)
    updates = 4
    for name, weight in states(before, 3, "weight").items():
        mean, square = (states(after, 1, kind)[name] for kind in ("exp_avg", "exp_avg_sq"))
        for kind, beta, now in (("exp_avg", first, mean), ("exp_avg_sq", second, square)):
            kept = states(before, 3, kind)[name]
            assert float(kept.norm()) > 0
            torch.testing.assert_close(now - states(anew, 1, kind)[name], beta * kept, rtol=1e-4, atol=1e-7)
        moved = weight - rate * mean / (1 - first**updates) / ((square / (1 - second**updates)).sqrt() + eps)
        torch.testing.assert_close(states(after, 1, "weight")[name], moved, rtol=1e-6, atol=1e-8)
    assert "and its optimizer's state after 3 updates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("source", "is a Hugging Face directory, which holds no optimizer's state; set train.init_optimizer=false"),
        ("imported", "step-00000000 holds no optimizer's state"),
    ],
)
def test_a_source_without_the_optimizer_s_state_is_refused(
    place: Path, tmp_path: Path, source: str, message: str
) -> None:
    given = recipe(place, tmp_path / "run", place / source).model_dump()
    given["train"]["init_optimizer"] = True
    config = RunConfig.model_validate(given)
    with pytest.raises(ConfigError, match=message):
        check_start(config, config.model.vocab or 0)


def test_another_optimizer_s_state_is_refused(place: Path, tmp_path: Path) -> None:
    given = recipe(place, tmp_path / "run", None).model_dump()
    sgd = {"kind": "sgd", "lr": 1e-3, "momentum": 0.9, "rules": [{"match": "head.weight", "freeze": True}]}
    train(RunConfig.model_validate({**given, "optim": sgd}))

    def refused(optim: dict[str, Any], message: str) -> None:
        given = recipe(place, tmp_path / "other", tmp_path / "run").model_dump()
        given["train"]["init_optimizer"] = True
        config = RunConfig.model_validate({**given, "optim": optim})
        with pytest.raises(ConfigError, match=message):
            check_start(config, config.model.vocab or 0)

    refused(
        {"lr": 1e-3}, "has the state of optim.kind=sgd, not adamw; use that kind, or set train.init_optimizer=false"
    )
    refused({**sgd, "momentum": 0.0}, "was trained with optim.momentum=0.9, not 0")
    refused({**sgd, "rules": []}, "has no optimizer's state of head.weight, which this run trains")


def test_other_first_weights_are_another_run(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = recipe(place, run, place / "imported")
    first = fingerprint(place / "imported")
    fixed = {"data_fingerprint": "d", "tokenizer_fingerprint": "t", "data_path": "", "format": "megalm-run-1"}
    known = {**fixed, "fixed": fixed_settings(config), "init_from": {"path": "gone", "fingerprint": first}}
    (run / "run.json").write_text(json.dumps(known))
    assert check_run(config, "d", "t") is not None  # the same weights at another place
    with pytest.raises(ConfigError, match=f"first weights .* {first[:12]} there, none here"):
        check_run(recipe(place, run, None), "d", "t")
    other = recipe(place, run, place / "source")
    with pytest.raises(ConfigError, match=f"{first[:12]} there, {fingerprint(place / 'source')[:12]} here"):
        check_run(other, "d", "t")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab": 300}, r"embedding.weight has shape \(280, 48\) there and \(300, 48\) .*; set model.vocab=280"),
        ({"ffn": 96}, r"mlp.* has shape \(.*88.*\) there and \(.*96.*\) in this model; make the model section"),
        ({"layers": 2}, r"lacks blocks.1.attention.out.weight and 5 more, which this model has"),
        ({"tie_embeddings": True}, r"has head.weight, which this model has not"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(
    place: Path, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    for source in ("source", "imported"):
        config = recipe(place, tmp_path / "run", place / source, **model)
        with pytest.raises(ConfigError, match=message):
            check_start(config, config.model.vocab or 0)


def test_fresh_keeps_the_old_run_until_the_first_weights_are_there(place: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", tmp_path / "copy"
    config = recipe(place, run, None)
    train(config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[:4] != "run."}
    for own in (run, run / "checkpoints" / "step-00000002"):
        with pytest.raises(ConfigError, match=r"train\.init_from=.* is in run\.dir=.*, which --fresh removes"):
            train(recipe(place, run, own), fresh=True)
    shutil.copytree(place / "imported", source)
    damaged = next(source.rglob("*-weight.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=damaged.name):
        train(recipe(place, run, source), fresh=True)
    assert {path: path.read_bytes() for path in before} == before
    assert is_doomed(run) and read_identity(run)["saved"], "the job, started again, begins anew"  # type: ignore[index]
    train(recipe(place, run, place / "imported"), fresh=True)
    assert not is_doomed(run)
    assert same(weights(run, 2), dict(HuggingFaceReader(place / "source").tensors()))


def test_one_process_compares_a_head_with_the_embedding_to_which_it_is_tied(place: Path, tmp_path: Path) -> None:
    values = {**values_of("llama"), "vocab_size": 280, "num_hidden_layers": 1, "tie_word_embeddings": True}
    source = make(tmp_path / "source", values, **{"lm_head.weight": torch.ones(280, 48)})
    config = recipe(place, tmp_path / "run", source, tie_embeddings=True)
    opened = check_start(config, 280)
    assert isinstance(opened, HuggingFaceReader) and opened.bytes_read == 0
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        check_start(config, 280, Tokenizer.load(place / "data"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        train(config)


def test_what_is_no_source_is_refused_before_anything_starts(place: Path, tmp_path: Path) -> None:
    arguments = ["train", "gpt-tiny", f"run.dir={tmp_path / 'run'}", f"data.path={place / 'data'}"]
    assert cli.main([*arguments, f"train.init_from={tmp_path / 'nothing'}"]) == 2
    assert cli.main([*arguments, f"train.init_from={place / 'imported'}"]) == 2  # another model
    assert not (tmp_path / "run" / "run.json").exists()
    other = Tokenizer.load(place / "data")
    other.serialized += b"\n"
    assert companions_of(place / "source", other) == {}, "special tokens of another tokenizer are not these"
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        fingerprint(tmp_path)


def test_a_model_that_computes_otherwise_is_said_to(place: Path, tmp_path: Path) -> None:
    for source in ("source", "imported"):
        config = recipe(place, tmp_path / "run", place / source, rotary_base=5e5)
        assert notes(config, check_start(config, config.model.vocab or 0))[1:] == [
            "the source computed otherwise than model.rotary_base=500000.0"
        ]


def test_the_fingerprint_knows_another_file_from_this_one(place: Path, tmp_path: Path) -> None:
    first = fingerprint(place / "source")
    shutil.copytree(place / "source", tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert fingerprint(tmp_path / "copy") != first
