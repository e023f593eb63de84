"""Checkpoints of Megatron-LM, of any ranks, become the model that its own formulas describe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.cli import main
from megalm.data.tokenizer import train_bpe
from megalm.errors import CheckpointError
from megalm.models.foreign import names
from megalm.models.foreign.command import import_model
from megalm.models.foreign.names import gated_rows
from megalm.models.foreign.read import read_foreign_megatron
from tests.models.foreign.gpt import (
    LEGACY,
    TE,
    Shape,
    Weights,
    logits,
    query_groups,
    random_weights,
    save_megatron,
)
from tests.models.foreign.runs import logits_of, tensors_of

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
GPT = Shape()
LLAMA = Shape(groups=2, rms=True, swiglu=True, rope=True, bias=False, qkv_bias=False, tied=False)
CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "one rank": (GPT, {}),
    "tensor 2, pipeline 2": (GPT, {"tensor": 2, "pipeline": 2}),
    "legacy, tensor 2, pipeline 2": (GPT, {"tensor": 2, "pipeline": 2, "names": LEGACY}),
    "llama, te, tensor 2, virtual stages": (LLAMA, {"tensor": 2, "pipeline": 2, "virtual": 2, "names": TE}),
    "llama, tensor 4": (LLAMA, {"tensor": 4}),
    "erf, bias of qkv alone, share of rope": (
        Shape(rms=True, rope=True, rope_share=0.5, head=8, bias=False, squared_relu=True, qk_norm=True),
        {"tensor": 2},
    ),
    "multi-query with gates and window": (Shape(groups=1, rope=True, gate=True, window=3, fused_gelu=False), {}),
}


def imported(directory: Path, run: Path, vocab: int | None = None) -> Path:
    import_model(read_foreign_megatron(directory, vocab), run, None)
    return run


@pytest.mark.parametrize(("shape", "layout"), list(CASES.values()), ids=list(CASES))
def test_an_imported_model_gives_the_logits_of_megatrons_formulas(
    tmp_path: Path, shape: Shape, layout: dict[str, Any]
) -> None:
    weights = random_weights(shape)
    run = imported(save_megatron(tmp_path / "megatron", shape, weights, **layout), tmp_path / "run")
    torch.testing.assert_close(logits_of(run, TOKENS), logits(shape, weights, TOKENS), rtol=1e-11, atol=1e-11)


def ours(shape: Shape, w: Weights) -> dict[str, Tensor]:
    """Return megalm's tensors of a model with gates in its MLP and no biases, as its documentation has them."""
    found = {"embedding.weight": w["embedding"], "head.weight": w["head"], "final_norm.weight": w["final.weight"]}
    for n in range(shape.layers):
        found |= {
            f"blocks.{n}.attention_norm.weight": w[f"{n}.norm1.weight"],
            f"blocks.{n}.mlp_norm.weight": w[f"{n}.norm2.weight"],
            f"blocks.{n}.attention.qkv.weight": query_groups(shape, w, n, "weight"),
            f"blocks.{n}.attention.out.weight": w[f"{n}.out.weight"].flatten(1),
            f"blocks.{n}.mlp.up.weight": torch.stack((w[f"{n}.left.weight"], w[f"{n}.right.weight"])),
            f"blocks.{n}.mlp.down.weight": w[f"{n}.down.weight"],
        }
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_comes_over_in_the_dtype_that_it_had(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_weights(LLAMA, dtype)
    directory = save_megatron(tmp_path / "megatron", LLAMA, weights, tensor=2, pipeline=2, bf16=dtype == torch.bfloat16)
    expected, found = ours(LLAMA, weights), tensors_of(imported(directory, tmp_path / "run"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name


def test_rows_that_pad_the_vocabulary_are_left_out_on_demand(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    run = imported(save_megatron(tmp_path / "megatron", LLAMA, weights, tensor=2), tmp_path / "run", vocab=21)
    torch.testing.assert_close(logits_of(run, TOKENS), logits(LLAMA, weights, TOKENS)[:, :21], rtol=1e-11, atol=1e-11)


def test_norms_that_count_from_zero_get_their_one(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    less = {name: value - 1.0 if "norm" in name or name == "final.weight" else value for name, value in weights.items()}
    directory = save_megatron(tmp_path / "megatron", LLAMA, less, apply_layernorm_1p=True)
    found = logits_of(imported(directory, tmp_path / "run"), TOKENS)
    torch.testing.assert_close(found, logits(LLAMA, weights, TOKENS), rtol=1e-10, atol=1e-10)


REFUSED = {
    "num_experts": 8,
    "multi_latent_attention": True,
    "apply_residual_connection_post_layernorm": True,
    "rotary_interleaved": True,
    "quick_geglu": True,
    "softmax_type": "learnable",
    "mtp_num_layers": 1,
    "use_mup": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_recipe_cannot_express_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    directory = save_megatron(tmp_path / "megatron", LLAMA, random_weights(LLAMA), **{name: REFUSED[name]})
    with pytest.raises(CheckpointError, match=f"its argument {name}="):
        read_foreign_megatron(directory)


NO_NUMBERS: dict[str, Any] = {
    "hidden_dropout": [1], "norm_epsilon": "x", "rotary_base": "x", "rotary_percent": {}, "rope_scaling_factor": [2],
    "rotary_seq_len_interpolation_factor": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_where_one_belongs_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    others = {"use_rope_scaling": name == "rope_scaling_factor", name: NO_NUMBERS[name]}
    directory = save_megatron(tmp_path / "megatron", LLAMA, random_weights(LLAMA), **others)
    with pytest.raises(CheckpointError, match=rf"its argument {name}=.*: it is no number"):
        read_foreign_megatron(directory)


def test_layernorm_without_biases_of_linear_layers_is_refused(tmp_path: Path) -> None:
    shape = Shape(bias=False, qkv_bias=False)
    directory = save_megatron(tmp_path / "megatron", shape, random_weights(shape))
    with pytest.raises(CheckpointError, match="add_bias_linear"):
        read_foreign_megatron(directory)


def test_missing_ranks_and_tensors_left_over_are_errors(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    directory = save_megatron(tmp_path / "megatron", LLAMA, weights, tensor=2, pipeline=2)
    shutil.rmtree(directory / "iter_0000040" / "mp_rank_01_001")
    with pytest.raises(CheckpointError, match=r"2 tensor and 2 pipeline ranks, but has 3 .*tensor rank 1, stage 1"):
        read_foreign_megatron(directory)
    sizes = {f"{axis}_model_parallel_size": 100_000 for axis in ("tensor", "pipeline")}
    directory = save_megatron(tmp_path / "claims", LLAMA, weights, **sizes)  # ten thousand million ranks
    with pytest.raises(CheckpointError, match=r"but has 1 directories \(first to differ: tensor rank 0, stage 1\)"):
        read_foreign_megatron(directory)
    directory = save_megatron(tmp_path / "fewer", LLAMA, weights, tensor=2, tensor_model_parallel_size=1)
    with pytest.raises(CheckpointError, match=r"but has 2 directories \(first to differ: tensor rank 1, stage 0\)"):
        read_foreign_megatron(directory)
    directory = save_megatron(tmp_path / "layers", LLAMA, weights, num_layers=10**9)
    with pytest.raises(CheckpointError, match="holds 4 layers, its arguments describe 1000000000"):
        read_foreign_megatron(directory)
    directory = save_megatron(tmp_path / "more", LLAMA, weights, names={"output_layer": "lm_head.dense"})
    with pytest.raises(CheckpointError, match=r"holds lm_head\.dense\.weight, which a recipe has no tensor for"):
        read_foreign_megatron(directory)
    directory = save_megatron(tmp_path / "less", LLAMA, weights, add_qkv_bias=True)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.attention\.qkv\.bias, .* nothing was imported"):
        read_foreign_megatron(directory)


def test_a_tied_copy_that_differs_is_an_error(tmp_path: Path) -> None:
    weights = random_weights(GPT)
    directory = save_megatron(tmp_path / "megatron", GPT, weights, pipeline=2)
    last = directory / "iter_0000040" / "mp_rank_00_001" / "model_optim_rng.pt"
    held = torch.load(last, weights_only=False)
    held["model"]["output_layer.weight"][3, 2] += 1e-9
    torch.save(held, last)
    with pytest.raises(CheckpointError, match=r"output_layer\.weight differs from the embedding"):
        imported(directory, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_oldest_layouts_are_refused(tmp_path: Path) -> None:
    directory = save_megatron(tmp_path / "megatron", GPT, random_weights(GPT), version=1.0)
    with pytest.raises(CheckpointError, match=r"checkpoint version 1\.0"):
        read_foreign_megatron(directory)


def test_the_command_asks_for_trust_and_says_what_it_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_megatron(tmp_path / "megatron", GPT, random_weights(GPT), tensor=2)
    command = ["import-megatron", str(directory), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "pickles of another program" in said and "--trust" in said and not (tmp_path / "run").exists()
    for name, text, says in (("recipe.yaml", "seed: 1\n", "tokenizer"), ("large.json", None, "embedding 24 rows")):
        given = tmp_path / name
        if text is None:
            train_bpe([" ".join(map(str, range(200)))], 300).save(tmp_path)
            (tmp_path / "tokenizer.json").rename(given)
        else:
            given.write_text(text)
        assert main([*command, "--trust", f"--tokenizer={given}"]) == 2
        said = capsys.readouterr().err
        assert says in said and str(given) in said and said.count("\n") == 1 and not (tmp_path / "run").exists(), said
    assert main([*command, "--trust", "--vocab", "23"]) == 0
    assert "Megatron-LM" in capsys.readouterr().out
    assert tensors_of(tmp_path / "run")["embedding.weight"].shape == (23, 16)
    assert main([*command, "--trust"]) == 2 and "is there already" in capsys.readouterr().err


FAULTS: dict[str, Any] = {
    "gates joined one behind the other": ("gated_rows", lambda parts: torch.cat(list(parts)).unflatten(0, (2, -1))),
    "ranks in the other order": ("gated_rows", lambda parts: gated_rows(list(parts)[::-1])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_logits_tell_of_a_wrong_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Shapes are right with these faults, so nothing else would."""
    monkeypatch.setattr(names, *FAULTS[fault])
    weights = random_weights(LLAMA)
    run = imported(save_megatron(tmp_path / "megatron", LLAMA, weights, tensor=2), tmp_path / "run")
    assert (logits_of(run, TOKENS) - logits(LLAMA, weights, TOKENS)).abs().max() > 1e-3
