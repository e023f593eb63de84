"""Every family: transformers' logits from its own files in any layout, and the same bits back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.generation.generate import gather_vocabulary
from megalm.models.build import build_executor, build_stage
from megalm.models.huggingface.exporting import export_model
from megalm.models.huggingface.families import FAMILIES
from megalm.models.huggingface.importing import import_model
from megalm.models.huggingface.reader import HuggingFaceReader
from megalm.models.trained import read_weights
from megalm.pipeline_parallel.executor import Microbatch
from tests.models.huggingface.families import CONFIGS, VOCAB, logits, save, some_tokens
from tests.worker_pool import WorkerPool

pytest.importorskip("transformers")

NAMES = tuple(CONFIGS)
DIVIDED: dict[RankLayout, tuple[str, ...]] = {
    RankLayout(pipeline=2, tensor=2): (
        *("gpt2", "llama 3, grouped, tied", "qwen2", "qwen3 with biases and windows", "gpt-neox", "gemma 2", "mixtral"),
        *("llama, one key head, biases of attention, large heads", "mistral", "qwen3-moe"),
    ),
    RankLayout(tensor=4): ("gpt2", "llama", "gpt-neox, one half after the other, tied", "mixtral"),
    RankLayout(pipeline=4): (
        "gpt2 untied, wide, exact gelu",
        "mistral without a window",
        "gemma 2 without caps, untied",
    ),
}
"""Each table in several processes; 4 ranks divide 4 key heads, and no number of them the vocabulary."""


def our_logits(mesh: ParallelMesh, directories: list[Path], tokens: Tensor, precision: str) -> list[Tensor | None]:
    """Return the logits of models read from their files, put together; None on stages that have none."""
    return [_logits(mesh, directory, tokens, precision) for directory in directories]


def _logits(mesh: ParallelMesh, directory: Path, tokens: Tensor, precision: str) -> Tensor | None:
    reader = HuggingFaceReader(directory)
    config = RunConfig.model_validate(
        {
            "model": reader.section, "precision": precision, "optim": {"lr": 1.0},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            "parallel": {"tensor": mesh.size("tensor"), "pipeline": mesh.size("pipeline")},
        }
    )  # fmt: skip
    model = build_stage(config, VOCAB, mesh).eval()
    read_weights(model, reader)
    outputs = build_executor(config, model, mesh).forward_only([Microbatch(tokens)])
    if not outputs:
        return None
    return gather_vocabulary(outputs[0].movedim(-1, 0), mesh.group("tensor"), VOCAB).movedim(0, -1)


def worst(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directory of each configuration, as transformers saves it."""
    folder = tmp_path_factory.mktemp("saved")
    return {name: save(name, folder / str(number)) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Return transformers' logits of each configuration in fp32."""
    return {name: logits(name, some_tokens()) for name in NAMES}


def test_logits_are_those_of_transformers(
    pool: WorkerPool, saved: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    (found,) = pool.run(our_logits, [saved[name] for name in NAMES], some_tokens(), "fp32", layout=RankLayout())
    off = {name: worst(logits_BTV, expected[name]) for name, logits_BTV in zip(NAMES, found, strict=True)}
    assert {name: value for name, value in off.items() if not value < 1e-5} == {}


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_every_family_is_divided_over(axis: str) -> None:
    divided = {CONFIGS[name][0] for layout, names in DIVIDED.items() if getattr(layout, axis) > 1 for name in names}
    assert divided == FAMILIES.keys()


@pytest.mark.parametrize("layout", DIVIDED, ids=lambda layout: f"tensor {layout.tensor}, pipeline {layout.pipeline}")
def test_logits_are_those_of_transformers_in_a_layout(
    pool: WorkerPool, saved: dict[str, Path], expected: dict[str, Tensor], layout: RankLayout
) -> None:
    names = DIVIDED[layout]
    ranks = pool.run(our_logits, [saved[name] for name in names], some_tokens(), "fp32", layout=layout)
    for number, name in enumerate(names):
        having = [found[number] for found in ranks if found[number] is not None]
        assert len(having) == layout.tensor
        assert max(worst(found, expected[name]) for found in having) < 1e-5, name


def test_what_is_left_of_a_difference_is_rounding(pool: WorkerPool, saved: dict[str, Path]) -> None:
    """In float64, of those whose layers are in float64 there: their rotary angles and norms stay in float32."""
    (found,) = pool.run(our_logits, [saved["gpt2"]], some_tokens(), "fp64", layout=RankLayout())
    assert worst(found[0], logits("gpt2", some_tokens(), torch.float64)) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_with_the_same_bits(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    import_model(saved[name], run)
    result = export_model(run, out)
    assert result["largest_difference"] < 1e-5
    assert result["family"] == FAMILIES[CONFIGS[name][0]].name
    before, after = (load_file(directory / "model.safetensors") for directory in (saved[name], out))
    assert before.keys() == after.keys()
    assert [
        key for key in before if before[key].dtype != after[key].dtype or not same_bits(before[key], after[key])
    ] == []
    reader = CheckpointReader(run / "checkpoints" / "step-00000000")
    for key, values in HuggingFaceReader(out).tensors():
        assert same_bits(values, reader.read_local(ShardSpec.whole(key, tuple(values.shape)), "weight")), key


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are alike to the last bit."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama 3, grouped, tied"])
def test_files_in_several_parts_and_bf16_come_back_too(tmp_path: Path, name: str) -> None:
    source = save(name, tmp_path / "source", torch.bfloat16, shard_bytes=30_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    result = import_model(source, tmp_path / "run")
    assert (result["precision"], result["stored"]) == ("bf16", "bf16")
    assert export_model(tmp_path / "run", tmp_path / "out", shard_bytes=20_000)["files"] > 3
    before, after = (
        {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
        for directory in (source, tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)
