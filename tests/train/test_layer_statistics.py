"""Statistics by layer: right on one process, the same in every layout, and without a trace in the training."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.data.loader import Batch
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.train import layer_statistics
from megalm.train.layer_report import FIGURES, INSPECT_FILE, layer_names
from megalm.train.layer_statistics import LayerStatistics
from megalm.train.metrics_file import read_metrics
from megalm.train.trainer import Trainer
from megalm.zero.engine import kept_buffers
from tests.parity.harness import VOCAB, Case, build_trainer
from tests.worker_pool import WorkerPool

SMALL: dict[str, Any] = {
    "model.layers": 4, "model.hidden": 16, "model.heads": 4, "model.kv_heads": 2, "model.sequence": 8,
    "model.activation": "relu", "model.dropout": 0.1, "inspect.every": 2, "train.steps": 12,
}  # fmt: skip


def trainer_of(mesh: ParallelMesh, run: Path, **overrides: Any) -> tuple[Trainer, LayerStatistics]:
    layout = mesh.layout
    context = {"parallel.context": layout.context} if layout.context > 1 else {}
    case = Case(layout.pipeline, layout.data, layout.tensor, {**SMALL, **context, "run.dir": str(run), **overrides})
    run.mkdir(exist_ok=True)
    trainer = build_trainer(mesh, case.config())
    layers = LayerStatistics(trainer.config, mesh, trainer.engine.module, 0)  # type: ignore[arg-type]
    trainer.before_step.append(layers.before_step)
    trainer.before_update.append(layers.before_update)
    return trainer, layers


def sampled(trainer: Trainer, layers: LayerStatistics, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        result = trainer.train_step()
        layers.after_step(trainer, result)
        losses.append(result.loss)
    return losses


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def forward_by_hand(model: Any, tokens_BT: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """Return each block's output, its feed-forward units, and the attention probabilities of row 0."""
    outputs: dict[int, Tensor] = {}
    units: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}

    def attend(index: int, inner: Any, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        keys = k[0].repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        scores = torch.einsum("the,she->hts", q[0], keys) / q.shape[-1] ** 0.5
        seen[index] = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)
        return inner(q, k, v, **how)

    hooks = []
    for name, block in model.blocks.items():
        index, attention = int(name), block.attention
        hooks.append(block.register_forward_hook(lambda m, i, x, index=index: outputs.update({index: x})))
        hooks.append(block.mlp.down.register_forward_pre_hook(lambda m, x, index=index: units.update({index: x[0]})))
        attention.attend = partial(attend, index, attention.attend)
    with torch.no_grad():
        model(tokens_BT)
    for hook in hooks:
        hook.remove()
    for block in model.blocks.values():
        block.attention.attend = block.attention.attend.args[1]
    return outputs, units, seen


def check_padding(mesh: ParallelMesh, run: Path, other: Path) -> None:
    """Measure the same rows twice, with other tokens for padding, and beside the same tokens a row each."""
    how = {"data.rows": "documents", "model.dropout": 0.0, "inspect.every": 1, "train.recompute": "full"}
    records = []
    for place, shift in ((run, 0), (other, 1)):
        trainer, layers = trainer_of(mesh, place, **how)
        text = trainer.loader

        def batch(first: int, size: int, count: int, text: Any = text, shift: int = shift) -> Batch:
            rows = text.batch(first + 1, size, size)
            moved = torch.where(rows.loss_mask_BT, rows.tokens_BT, (rows.tokens_BT + shift) % VOCAB)
            return Batch(moved, rows.labels_BT, rows.loss_mask_BT)

        trainer.loader = SimpleNamespace(batch=batch)  # type: ignore[assignment]
        sampled(trainer, layers, 1)
        (record,) = read_metrics(place / INSPECT_FILE)
        records.append(record)
    assert records[0] == pytest.approx(records[1], rel=1e-12)
    model, rows = trainer_of(mesh, run)[0].engine.module, text.batch(1, 8, 8)
    outputs, units, p = forward_by_hand(model, rows.tokens_BT)
    mask_BT, first = rows.loss_mask_BT, int(rows.loss_mask_BT[0].sum())
    assert 1 < first < 8 and not mask_BT.all(), "the first row is padded"
    for index in range(4):
        assert records[0][f"blocks.{index}/activation_rms"] == pytest.approx(
            float(outputs[index][mask_BT].square().mean().sqrt()), rel=1e-9
        )
        h_NF = units[index][mask_BT]
        dead = (h_NF.abs().amax(0) < layer_statistics.DEAD * h_NF.square().mean().sqrt()).double().mean()
        assert records[0][f"blocks.{index}/dead_units"] == float(dead)
        head_p = p[index][(1 + index) % 4][:first]
        assert records[0][f"blocks.{index}/attention_entropy"] == pytest.approx(
            float(torch.special.entr(head_p).sum(-1).mean()), rel=1e-9
        )


def test_padding_is_not_measured(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_padding, tmp_path / "a", tmp_path / "b", layout=RankLayout())


def check_by_hand(mesh: ParallelMesh, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_statistics, "DEAD", 2.0)
        compare_by_hand(mesh, run)


def compare_by_hand(mesh: ParallelMesh, run: Path) -> None:
    trainer, layers = trainer_of(mesh, run, **{"model.dropout": 0.0, "train.clip_grad_norm": None})
    sampled(trainer, layers, 1)
    parameters = dict(trainer.engine.module.named_parameters())
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    outputs, units, p = forward_by_hand(trainer.engine.module, trainer.loader.batch(8, 8, 8).tokens_BT)
    gradients: dict[str, Tensor] = {}
    trainer.before_update.append(
        lambda trainer: gradients.update({name: weight.grad.clone() for name, weight in parameters.items()})
    )
    sampled(trainer, layers, 1)
    (record,) = read_metrics(run / INSPECT_FILE)
    for index in range(4):
        own = [name for name in parameters if name.startswith(f"blocks.{index}.")]
        h = units[index].flatten(0, 1)
        rms = float(h.square().mean().sqrt())
        head_p = p[index][(1 + index) % 4]
        expected = {
            "weight_norm": norm([parameters[name].detach() for name in own]),
            "gradient_norm": norm([gradients[name] for name in own]),
            "update_ratio": norm([parameters[name].detach() - before[name] for name in own])
            / norm([parameters[name].detach() for name in own]),
            "activation_rms": float(outputs[index].square().mean().sqrt()),
            "dead_units": float((h.abs().amax(0) < 2.0 * rms).double().mean()),
            "attention_entropy": float(torch.special.entr(head_p).sum(-1).mean()),
        }
        assert expected.keys() == FIGURES.keys()
        for figure, value in expected.items():
            assert record[f"blocks.{index}/{figure}"] == pytest.approx(value, rel=1e-9), (index, figure)
    assert record["embedding/weight_norm"] > 0 and "embedding/activation_rms" not in record
    assert not any(block._forward_hooks or block.mlp.down._forward_pre_hooks for block in
                   trainer.engine.module.blocks.values())  # type: ignore[union-attr]  # fmt: skip


def test_figures_are_those_that_one_computes_by_hand(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_by_hand, tmp_path / "run", layout=RankLayout())


def record_of(mesh: ParallelMesh, run: Path, overrides: dict[str, Any]) -> list[dict[str, float]]:
    trainer, layers = trainer_of(mesh, run, **overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_statistics, "DEAD", 2.0)  # of a model that is so young nothing is dead
        sampled(trainer, layers, 4)
    return read_metrics(run / INSPECT_FILE) if mesh.rank == 0 else []


AHEAD = {"model.mtp_depth": 1, "model.kv_rank": 6, "model.kv_heads": None, "model.tie_embeddings": False}
PADDED = {"train.pad_batch": True, "train.global_batch": 7, "train.micro_batch": 2}
LAYOUTS: list[tuple[RankLayout, dict[str, Any]]] = [
    (RankLayout(tensor=2), {}),
    (RankLayout(tensor=2), {"parallel.sequence": True, "train.recompute": "selective"}),
    (RankLayout(pipeline=2), {"parallel.partition": [1, 3], "train.micro_batch": 1}),
    (RankLayout(pipeline=2), {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2}),
    (RankLayout(pipeline=2), {"parallel.schedule": "zb-v", "train.recompute": "full"}),
    (RankLayout(data=2), {"train.recompute": "full"}),
    (RankLayout(data=2), {"zero.stage": 1}),
    (RankLayout(data=2), {"zero.stage": 2, "zero.config": "zero2-offload"}),
    (RankLayout(data=4), {"zero.stage": 3, "precision": "fp32"}),
    (RankLayout(data=2, context=2), {"zero.stage": 1}),
    (RankLayout(tensor=2, context=2), {"parallel.context_attention": "ulysses", "parallel.sequence": True}),
    (RankLayout(pipeline=2, data=2, tensor=2), {"zero.stage": 2, "parallel.sequence": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [{}, {"model.tie_embeddings": False}, {"data.rows": "documents"}, PADDED, AHEAD], ids=str
)
def test_every_layout_gives_the_same_figures(pool: WorkerPool, tmp_path: Path, model: dict[str, Any]) -> None:
    limits = {"fp64": 1e-9, "fp32": 1e-4}
    expected = {
        precision: pool.run(record_of, tmp_path / precision, {**model, "precision": precision}, layout=RankLayout())[0]
        for precision in limits
    }
    whole, blocks = expected["fp64"], 4 + model.get("model.mtp_depth", 0)
    assert [record["step"] for record in whole] == [2, 4] and len(whole[0]) == 1 + blocks * len(FIGURES) + 2 * 3
    assert 0.0 < whole[0]["blocks.0/dead_units"] < 1.0
    for number, (layout, overrides) in enumerate(LAYOUTS):
        precision = overrides.get("precision", "fp64")
        found = pool.run(record_of, tmp_path / str(number), {**model, **overrides}, layout=layout)[0]
        for one, other in zip(expected[precision], found, strict=True):
            assert one.keys() == other.keys()
            for figure, value in one.items():
                assert other[figure] == pytest.approx(value, rel=limits[precision]), (layout, overrides, figure)


def check_unseen(mesh: ParallelMesh, place: Path) -> None:
    """Sampling changes no bit of the losses, and steps that are redone stand once."""
    fp32 = {"precision": "fp32"}
    trainer, layers = trainer_of(mesh, place / "seen", **fp32)
    plain, silent = trainer_of(mesh, place / "unseen", **fp32, **{"inspect.every": 0})
    assert sampled(trainer, layers, 6) == sampled(plain, silent, 6)
    for name, weight in trainer.engine.module.named_parameters():
        assert torch.equal(weight, dict(plain.engine.module.named_parameters())[name])
    assert not (place / "unseen" / INSPECT_FILE).exists()

    def steps() -> list[float]:
        return [record["step"] for record in read_metrics(place / "seen" / INSPECT_FILE)] if mesh.rank == 0 else []

    assert steps() == [2, 4, 6][: 3 * (mesh.rank == 0)]
    trainer.state.step = 3  # as after a rollback
    sampled(trainer, layers, 2)
    assert steps() == [2, 4][: 2 * (mesh.rank == 0)]
    trainer.engine.loss_factor = math.nan
    sampled(trainer, layers, 1)
    assert steps() == [2, 4][: 2 * (mesh.rank == 0)], "a step without an update is left out"
    LayerStatistics(trainer.config, mesh, trainer.engine.module, 2).at_end(trainer)  # type: ignore[arg-type]
    assert steps() == [2][: mesh.rank == 0], "a run that resumes at step 2"


def test_sampling_changes_nothing_and_no_step_stands_twice(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_unseen, tmp_path, layout=RankLayout(data=2))


def test_layers_are_told_apart() -> None:
    assert layer_names(2) == ["embedding", "blocks.0", "blocks.1", "head"]


def check_weights_with_biases(mesh: ParallelMesh, run: Path) -> None:
    balance = {"model.experts": 4, "model.router_bias_rate": 5.0, "model.router_score": "sigmoid", "inspect.every": 1}
    trainer, layers = trainer_of(mesh, run, **balance)
    sampled(trainer, layers, 3)
    *_, record = read_metrics(run / INSPECT_FILE)
    module = trainer.engine.module
    assert all(bool(bias.any()) for bias in kept_buffers(module)), "the biases have moved"
    weights = [p.detach() for name, p in module.named_parameters() if name.startswith("blocks.1.")]
    assert record["blocks.1/weight_norm"] == pytest.approx(norm(weights), rel=1e-9)


def test_biases_of_routers_are_no_weights(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(check_weights_with_biases, tmp_path / "run", layout=RankLayout())
