"""A checkpoint's weights in another layout than the one that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm.checkpoint.writer import write_checkpoint
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment
from megalm.models.build import build_stage
from megalm.models.trained import load_trained
from megalm.pipeline_parallel.executor import Microbatch
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerError, WorkerPool

VOCAB = 11


def recipe(layout: RankLayout, seed: int, hidden: int = 8) -> RunConfig:
    return small_recipe(
        seed=seed,
        model={"init_std": 0.5, "hidden": hidden},
        parallel={"tensor": layout.tensor, "pipeline": layout.pipeline},
    )


def save(mesh: ParallelMesh, run: str) -> list[float]:
    """Write the weights of one seed; return the logits that they give."""
    model = build_stage(recipe(mesh.layout, seed=1), VOCAB, mesh)
    fragments = [
        Fragment(parameter.shard, "weight", 0, parameter.detach().flatten())  # type: ignore[attr-defined]
        for parameter in model.parameters()
    ]
    write_checkpoint(Path(run) / "checkpoints", 7, fragments, {})
    with torch.no_grad():
        return list(model(torch.arange(8)[None]).flatten().tolist())


def load(mesh: ParallelMesh, run: str, hidden: int = 8) -> tuple[int, list[list[float]]]:
    """Read them into a model that was made with another seed; return this rank's part of the logits."""
    trained = load_trained(Path(run), recipe(mesh.layout, 2, hidden), VOCAB, mesh)
    outputs = trained.executor.forward_only([Microbatch(torch.arange(8)[None])])
    return trained.step, outputs[0][0].tolist() if outputs else []


@pytest.mark.parametrize("layout", [RankLayout(), RankLayout(pipeline=2, tensor=2)], ids=str)
def test_weights_come_from_the_checkpoint_in_every_layout(pool: WorkerPool, tmp_path: Path, layout: RankLayout) -> None:
    expected = torch.tensor(pool.run(save, str(tmp_path), layout=RankLayout())[0]).view(8, VOCAB)
    answers = pool.run(load, str(tmp_path), layout=layout)
    assert {step for step, _ in answers} == {7}
    parts = [torch.tensor(logits) for _, logits in answers if logits]
    assert len(parts) == layout.tensor
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, :VOCAB], expected, rtol=1e-5, atol=1e-6)


def test_a_run_without_checkpoint_and_one_of_another_model_are_errors(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="no checkpoint yet"):
        pool.run(load, str(tmp_path), layout=RankLayout())
    pool.run(save, str(tmp_path), layout=RankLayout())
    with pytest.raises(WorkerError, match=r"has shape .* in the checkpoint"):
        pool.run(load, str(tmp_path), 16, layout=RankLayout())
