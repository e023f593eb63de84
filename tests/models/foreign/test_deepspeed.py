"""Universal checkpoints that DeepSpeed itself has made become models that train on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.trained import trained_config
from megalm.distributed.layout import RankLayout
from megalm.distributed.world import joined_mesh
from megalm.errors import CheckpointError
from megalm.models.build import build_stage
from megalm.models.foreign.command import import_model
from megalm.models.foreign.read import read_foreign_deepspeed
from megalm.train.start import updates_of
from megalm.zero.engine import shard_of
from megalm.zero.replicated import ReplicatedEngine
from tests.models.foreign.deepspeed_training import (
    LR,
    SHAPE,
    STEPS,
    VOCAB,
    gradient,
    megatron_deepspeed_arguments,
    train_and_convert,
    trained,
)
from tests.models.foreign.gpt import LEGACY, Shape, Weights, logits, random_weights, renamed, tensor_rank
from tests.models.foreign.runs import logits_of, tensors_of
from tests.models.foreign.test_megatron import GPT, TOKENS, ours
from tests.worker_pool import WorkerPool


def without_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value[:VOCAB] if name in ("embedding.weight", "head.weight") else value for name, value in tensors.items()
    }


def check(run: Path, kind: str, expected: Weights) -> None:
    found, whole = tensors_of(run, kind), without_padding(ours(SHAPE, expected))
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_model_of_deepspeeds_trains_on_with_its_masters_and_moments(pool: WorkerPool, tmp_path: Path) -> None:
    directory, run = tmp_path / "deepspeed", tmp_path / "run"
    pool.run(train_and_convert, str(directory), layout=RankLayout(), timeout_s=1200)
    found = read_foreign_deepspeed(directory)
    assert found.step == STEPS and found.facts["optimizer_steps"] == STEPS
    import_model(found, run, None)
    start = random_weights(SHAPE, torch.float32)
    weights, *moments = trained(start)
    check(run, "weight", weights)
    check(run, "exp_avg", moments[0])
    check(run, "exp_avg_sq", moments[1])
    expected = logits(SHAPE, weights, TOKENS)[:, :VOCAB]
    torch.testing.assert_close(logits_of(run, TOKENS), expected, rtol=1e-4, atol=1e-5)
    found_next = next_update(run)
    for name, tensor in without_padding(ours(SHAPE, trained(start, STEPS + 1)[0])).items():
        torch.testing.assert_close(found_next[name], tensor, rtol=1e-5, atol=1e-6)


def next_update(run: Path) -> dict[str, Tensor]:
    """Return the weights after one update more by megalm's engine, from the imported checkpoint."""
    config = trained_config(run, ["run.device=cpu"])
    (checkpoint,) = (run / "checkpoints").iterdir()
    reader = CheckpointReader(checkpoint)
    with joined_mesh(config) as mesh:
        model = build_stage(config, VOCAB, mesh)
        engine = ReplicatedEngine(
            model,
            mesh,
            lambda named: torch.optim.AdamW([{"params": [p for _, p in named], "lr_scale": 1.0}], lr=LR),
            tied_weight=None,
            clip_norm=None,
            reduce_dtype=None,
            grad_norm=lambda tensors, squared: torch.stack([t.square().sum() for t in tensors]).sum(),
            overlap=False,
        )
        engine.load(reader.read_flat, ["exp_avg", "exp_avg_sq"], updates_of(reader))
        engine.begin(1)
        for parameter in model.parameters():
            parameter.grad = gradient(parameter.detach())
        engine.microbatch_done()
        engine.reduce()
        engine.update(LR)
        reader.close()
        return {shard_of(parameter).name: parameter.detach().clone() for parameter in model.parameters()}


def save_universal(directory: Path, shape: Shape, weights: Weights, names: dict[str, str], **others: object) -> Path:
    """Write a universal checkpoint as ds_to_universal lays it out, without what Adam keeps."""
    (directory / "zero").mkdir(parents=True)
    for name, tensor in renamed(tensor_rank(shape, weights, 0, 1), names).items():
        (directory / "zero" / name).mkdir()
        torch.save({"param": tensor, "cat_dim": 0}, directory / "zero" / name / "fp32.pt")
    torch.save({"param_groups": []}, directory / "zero" / "optimizer_state.pt")
    given = megatron_deepspeed_arguments(shape, 1)
    vars(given).update(others)
    torch.save({"args": given, "iteration": 9, "module": None}, directory / "mp_rank_00_model_states.pt")
    return directory


PIPE = {
    **{f"decoder.layers.{n}.": f"{n + 2}." for n in range(4)},
    "decoder.final_layernorm": "6",
    "embedding.word": "tied_modules.embed.word",
    "embedding.position": "tied_modules.embed.position",
    **{word: other for word, other in LEGACY.items() if word != "decoder."},
}


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_of_the_pipeline_module_are_known(tmp_path: Path, tied: bool) -> None:
    shape = Shape(tied=tied)
    names = (
        PIPE
        if tied
        else {**PIPE, "embedding.word": "1.word", "embedding.position": "1.position", "output_layer": "7.lm_head"}
    )
    weights = random_weights(shape)
    found = read_foreign_deepspeed(save_universal(tmp_path / "deepspeed", shape, weights, names))
    import_model(found, tmp_path / "run", None)
    torch.testing.assert_close(
        logits_of(tmp_path / "run", TOKENS), logits(shape, weights, TOKENS), rtol=1e-10, atol=1e-10
    )


EMBEDDING = "language_model.embedding.word_embeddings.weight"
NO_WEIGHTS: dict[str, tuple[object, str]] = {
    "a bare tensor": (torch.zeros(24, 16), "holds no tensor `param`"),
    "a single number": ({"param": torch.tensor(1.0)}, "its embedding is a single number"),
    "whole numbers": ({"param": torch.ones(24, 16, dtype=torch.int64)}, r"is torch\.int64, no weight's"),
    "truths": ({"param": torch.ones(24, 16, dtype=torch.bool)}, r"is torch\.bool, no weight's"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_weight_is_refused(tmp_path: Path, name: str) -> None:
    value, reason = NO_WEIGHTS[name]
    names = {"decoder.": "language_model.encoder.", "embedding.": "language_model.embedding."}
    directory = save_universal(tmp_path / "deepspeed", GPT, random_weights(GPT), names)
    torch.save(value, directory / "zero" / EMBEDDING / "fp32.pt")
    with pytest.raises(CheckpointError, match=reason):
        read_foreign_deepspeed(directory)


def test_gates_that_were_joined_blindly_and_models_of_others_are_refused(tmp_path: Path) -> None:
    names = {**LEGACY, "decoder.": "language_model.encoder."}
    weights = random_weights(SHAPE)
    blind = save_universal(tmp_path / "blind", SHAPE, weights, names, tensor_model_parallel_size=2)
    with pytest.raises(CheckpointError, match="joined without regard to its gate"):
        read_foreign_deepspeed(blind)
    other = save_universal(tmp_path / "other", SHAPE, weights, names)
    torch.save({"iteration": 9}, other / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="holds no `args`"):
        read_foreign_deepspeed(other)
    with pytest.raises(CheckpointError, match="ds_to_universal"):
        read_foreign_deepspeed(tmp_path)
