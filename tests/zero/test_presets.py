"""What the shipped DeepSpeed JSONs turn on beyond the stages, held to the one-process reference where a CPU runs it."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.deepspeed import deepspeed_config
from megalm.config.deepspeed_files import shipped_configs
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.train.trainer import TrainState
from megalm.zero.build import partitioner
from tests.parity import harness
from tests.parity.cases import DROPOUT, RECOMPUTE, SEQUENCE, batch, misses
from tests.parity.harness import Case, RankReport, build_trainer, compare, reference_run, run_case, train_rank
from tests.worker_pool import WorkerPool
from tests.zero.runs import LOW_MEMORY, OTHERS, Cell, check_cells, check_resume, check_skipped, run_steps, saved


def small(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Return the overrides for a shipped JSON with changes that fit a small model: every weight is divided."""
    content = json.loads(shipped_configs()[name].read_text())
    content["zero_optimization"] |= {"stage3_param_persistence_threshold": 1, **changes}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return {"zero.stage": content["zero_optimization"]["stage"], "zero.config": str(path)}


@pytest.mark.parametrize("name", ["zero3", "zero3-hpz"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_divided_weights_give_the_reference(pool: WorkerPool, tmp_path: Path, name: str, precision: str) -> None:
    """hpZ changes where weights are gathered from, not what is computed; its blocks are of two data ranks."""
    chosen = small(tmp_path, name, **({"zero_hpz_partition_size": 2} if name == "zero3-hpz" else {}))
    case = Case(1, 4, 1, {**chosen, **DROPOUT, **RECOMPUTE, **batch(8, 1)})
    difference, reports = run_case(pool, case, 5, precision=precision)
    assert not misses(difference, precision)
    held = [report.held_bytes["weights"] / report.held_bytes["master_weights"] for report in reports]
    assert held == pytest.approx([1.0 if name == "zero3" else 3.0] * 4, rel=0.05)
    tensor = Case(1, 4, 2, {**chosen, **SEQUENCE, **batch(8, 1)})
    assert not misses(run_case(pool, tensor, 5, precision=precision)[0], precision)


def test_hpz_resumes_bit_for_bit(pool: WorkerPool, tmp_path: Path) -> None:
    path = small(tmp_path, "zero3-hpz", zero_hpz_partition_size=2)["zero.config"]
    cells = [Cell("zero3", "bf16", path=path), Cell("zero3", "fp32", "sgd", path=path)]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(data=4))


def check_load_behind_a_skipped_step(mesh: ParallelMesh, path: str) -> None:
    """The node's copies of the weights are those of the skipped step's forward pass: the load must drop them."""
    config = Cell("zero3", "fp32", path=path).config(mesh)
    unbroken = build_trainer(mesh, config)
    run_steps(unbroken, 1)
    store, state = saved(unbroken), vars(unbroken.state).copy()
    resumed = build_trainer(mesh, config.model_copy(update={"seed": 99}))
    resumed.state.losses = [1e-3] * config.stability.spike_window
    assert resumed.train_step().wrong is not None
    resumed.config = config
    resumed.engine.load(store.read, sorted(store.kinds() - {"weight"}), 1)
    resumed.state = TrainState(**state)
    assert run_steps(resumed, 1) == run_steps(unbroken, 1)


def test_hpz_forgets_its_copies_when_weights_are_loaded(pool: WorkerPool, tmp_path: Path) -> None:
    path = small(tmp_path, "zero3-hpz", zero_hpz_partition_size=2)["zero.config"]
    pool.run(check_load_behind_a_skipped_step, path, layout=RankLayout(data=4))


class TorchQuantizer:
    """DeepSpeed's CUDAQuantizer in torch: symmetric int8, a scale for each group."""

    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        assert values.numel() % 8 == 0, "as the kernel asks"
        groups = values.float().view(values.numel() // 8, 8)
        scales = groups.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127.0
        return (groups / scales).round().to(torch.int8).flatten(), scales.flatten()

    def dequantize(self, values: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        groups = values.reshape(scales.numel(), -1).float() * scales.view(-1, 1)
        return groups.view(values.shape).to(dtype or torch.float16)


def train_quantized(mesh: ParallelMesh, config: RunConfig, steps: int) -> RankReport:
    from deepspeed.runtime.zero import partition_parameters

    from megalm.zero.deepspeed_engine import partition_weights

    joined = deepspeed_config(config, mesh.size("data"))
    kernel, harness.partitioner = (
        partition_parameters.CUDAQuantizer,
        lambda config, mesh: lambda module: partition_weights(module, mesh, joined),
    )
    partition_parameters.CUDAQuantizer = TorchQuantizer
    try:
        return train_rank(mesh, config, steps)
    finally:
        partition_parameters.CUDAQuantizer, harness.partitioner = kernel, partitioner


def test_weights_in_8_bits_round_the_reference(pool: WorkerPool, tmp_path: Path) -> None:
    """With the kernel written in torch: a weight is off by at most 1/254 of the largest of its eight.

    A gradient passes eight products of such weights, so some hundredths; the loss averages over all errors.
    """
    chosen = small(tmp_path, "zero3-plus-plus", zero_hpz_partition_size=2)
    case = Case(1, 4, 1, {**chosen, **batch(8, 1)})
    config = case.config(precision="fp32")
    found = compare(pool.run(train_quantized, config, 5, layout=case.layout), reference_run(config, 5))
    assert 1e-5 < found.loss < 2e-3 and 1e-3 < found.gradient < 0.1, found


def refusal(mesh: ParallelMesh, config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        partitioner(config, mesh)
    return str(caught.value)


def test_weights_in_8_bits_are_refused_without_a_gpu(pool: WorkerPool, tmp_path: Path) -> None:
    config = Case(1, 1, 1, small(tmp_path, "zero3-plus-plus", zero_hpz_partition_size=1)).config()
    (said,) = pool.run(refusal, config, layout=RankLayout())
    assert (
        "zero_quantized_weights=true needs DeepSpeed's CUDA kernel and this run computes on cpu; use zero3-hpz" in said
    )


def low_memory(stage: int) -> dict[str, Any]:
    return {"zero.stage": stage, "zero.config": LOW_MEMORY, "precision": "bf16"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_in_bf16_follow_the_reference_in_bf16(pool: WorkerPool, stage: int) -> None:
    """Which rounds weights, gradients and moments as often, in steps of 2^-8; the losses average over them."""
    for case in (Case(1, 2, 1, low_memory(stage)), Case(1 if stage == 3 else 2, 2, 2, low_memory(stage))):
        difference, (report, *_) = run_case(pool, case, 10)
        assert difference.gradient < 0.04 and difference.loss < 2e-3 and difference.norm < 0.02, (case.name, difference)
        held = report.held_bytes
        assert held["optimizer"] == 2 * held["master_weights"], "2 x 2 and 2 bytes a weight"
        if stage > 1:  # stage 1 divides gradients at the end of a step only
            assert held["gradients"] == held["optimizer"], "4 bytes a weight"


def updated(mesh: ParallelMesh, stage: int) -> list[tuple[bool, Tensor, Tensor, Tensor]]:
    """Return (decayed, weight, gradient, weight after one update) of each piece that this rank holds."""
    trainer = build_trainer(mesh, Case(1, 2, 1, {**low_memory(stage), "train.clip_grad_norm": None}).config())
    engine, pieces = trainer.engine, []
    before = [f.values.clone() for f in engine.state() if f.kind == "weight"]
    reduce = engine.reduce

    def reduce_and_look() -> None:
        reduce()
        pieces.extend((len(f.shard.global_shape) > 1, f.values.clone()) for f in engine.gradients())

    engine.reduce = reduce_and_look  # type: ignore[method-assign]
    trainer.train_step()
    after = [f.values.clone() for f in engine.state() if f.kind == "weight"]
    return [(*piece[:1], w, *piece[1:], u) for piece, w, u in zip(pieces, before, after, strict=True)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_update_in_bf16_is_torchs_adamw_on_bf16_weights(pool: WorkerPool, stage: int) -> None:
    optim = Case().config().optim
    lr = optim.lr / 5  # the first of five steps of warm-up
    moved = 0
    ranks = pool.run(updated, stage, layout=RankLayout(data=2))
    for decayed, weight, gradient, after in chain.from_iterable(ranks):
        assert weight.dtype == after.dtype == torch.bfloat16 and gradient.dtype == torch.float32
        expected = torch.nn.Parameter(weight.clone())
        expected.grad = gradient.bfloat16()
        decay = optim.weight_decay if decayed else 0.0
        torch.optim.AdamW([expected], lr, optim.betas, optim.eps, decay, fused=True).step()
        assert torch.equal(expected, after)
        moved += int((after != weight).sum())
    assert moved > 1000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_in_bf16_resume_bit_for_bit(pool: WorkerPool, stage: int) -> None:
    cells = [Cell(f"zero{stage}", "bf16", kind, LOW_MEMORY) for kind in ("adamw", "sgd", *OTHERS, "adafactor", "muon")]
    pool.run(check_cells, check_resume, cells, layout=RankLayout(data=2))
    pool.run(check_cells, check_skipped, cells[:2], None, layout=RankLayout(data=2))
