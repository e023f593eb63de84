"""The bytes of activations are those of the formulas: of a block, each of them, and the peak of a step within 5%."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.dry_run.rank import run_rank
from megalm.dry_run.world import pretended_mesh
from megalm.models.build import build_stage
from megalm.models.offload import MetaMover, Mover, Offload
from megalm.nn.masks import DropoutKeys
from tests.dry_run.real import observe
from tests.models.activations import Sizes, kept, owed, peak
from tests.offloading import ArrayMover
from tests.parity.harness import LLAMA, VOCAB, Case
from tests.worker_pool import WorkerPool

KINDS: dict[str, dict[str, Any]] = {"gpt": {}, "dropout": {"model.dropout": 0.1}, "llama": LLAMA}
SPLITS = {"one rank": (1, False), "tensor": (2, False), "sequence": (2, True)}
NARROW: dict[str, Any] = {"model.hidden": 48, "model.heads": 6, "model.sequence": 40, "model.layers": 3}


class Counting:
    """Counts what leaves for the host, block by block."""

    def __init__(self, mover: Mover) -> None:
        self.mover, self.sent = mover, list[int]()

    def to_host(self, flats: Sequence[Tensor]) -> Any:
        self.sent.append(sum(flat.nbytes for flat in flats))
        return self.mover.to_host(flats)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mover, name)


def bytes_of_a_block(config: RunConfig, mesh: ParallelMesh, mover: Mover) -> int:
    """Return what the second of the blocks keeps of a forward pass: all storages, once each."""
    model = build_stage(config, VOCAB, mesh)
    position: Any = model.position
    counting: Any = Counting(mover)
    model.offload = Offload(counting, [x for x in vars(position).values() if isinstance(x, Tensor)], small=0)
    tokens_BT = torch.zeros(2, config.model.sequence, dtype=torch.int64, device=mesh.device)
    model(tokens_BT, tokens_BT, tokens_BT >= 0, DropoutKeys(1, 2, 3))
    return counting.sent[1]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_the_tensors_of_the_formula(kind: str, recompute: str) -> None:
    """As on a GPU: by the kernels, with the fused attention and with a matrix of scores."""
    for (tensor, sequence), fused, precision in product(SPLITS.values(), (True, False), ("bf16", "fp32")):
        how = {"parallel.sequence": sequence, "model.flash_attention": fused, "precision": precision}
        chosen = {"model.kernels": "fused", "train.recompute": recompute, **how, **KINDS[kind]}
        config = Case(1, 1, tensor, {**NARROW, **chosen}).config()
        with pretended_mesh(RankLayout(tensor=tensor), 0) as mesh:
            found = bytes_of_a_block(config, mesh, MetaMover())
        assert found == sum(kept(config, recompute).values()), how


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_block_on_a_cpu_keeps_those_of_plain_torch(kind: str) -> None:
    mesh = replace(ParallelMesh.on_meta(RankLayout(), 0), device=torch.device("cpu"))
    for fused, recompute in product((True, False), ("none", "selective", "full")):
        chosen = {"model.flash_attention": fused, "train.recompute": recompute, "precision": "fp32"}
        config = Case(1, 1, 1, {**NARROW, **chosen, **KINDS[kind]}).config()
        assert bytes_of_a_block(config, mesh, ArrayMover()) == sum(kept(config, recompute, kernels=False).values())


def test_of_a_gpt_in_16_bits_two_parts_are_less_than_published() -> None:
    """sbh(34 + 5as/h) of Korthikanti et al. 2022, equation 1, without the masks, and with the norms' statistics."""
    model = {"model.hidden": 1024, "model.heads": 16, "model.sequence": 512, "model.layers": 2}
    for fused in (True, False):
        chosen = {**model, "precision": "bf16", "model.dropout": 0.1, "model.flash_attention": fused}
        config = Case(1, 1, 1, chosen).config()
        z = Sizes.of(config)
        sbh, a_s_by_h = z.n * z.D, z.heads * z.T / z.D
        scores = z.n * z.heads * 4 if fused else 4 * a_s_by_h * sbh
        assert sum(kept(config, "none").values()) == 32 * sbh + scores + 16 * z.n
        assert owed(config) == 32 * sbh


def test_with_selective_recomputation_20_of_published_34_parts_are_kept_on_each_tensor_rank() -> None:
    """sbh 34/t of Korthikanti et al. 2022, table 2, without masks and what norms and GELU make."""
    model = {"model.hidden": 1024, "model.heads": 16, "model.sequence": 512, "model.layers": 2}
    for t in (2, 4, 8):
        config = Case(1, 1, t, {**model, "precision": "bf16", "parallel.sequence": True}).config()
        z = Sizes.of(config)
        statistics = 4 * z.n * z.heads + 16 * z.s
        assert sum(kept(config, "selective").values()) == 20 * z.s * z.D + statistics
        assert sum(kept(config, "none").values()) == 4 * z.n * z.D + 28 * z.s * z.D + statistics


def recipe(kind: str, stages: int, schedule: str, split: tuple[int, bool], **train: Any) -> Case:
    shape = {"model.layers": 8 * stages, "model.hidden": 64, "model.sequence": 256, "train.global_batch": 32}
    how = {"parallel.schedule": schedule, "parallel.sequence": split[1], "train.micro_batch": 4, "precision": "fp32"}
    more = {f"train.{key}": value for key, value in train.items()}
    return Case(stages, 1, split[0], {**shape, **how, **more, **KINDS[kind]})


RECOMPUTED = [{}, {"recompute": "selective"}, {"recompute": "full"}, {"recompute": "full", "recompute_every": 2}]


@pytest.mark.parametrize("split", ["one rank", "sequence"])
@pytest.mark.parametrize(("stages", "schedule"), [(1, "1f1b"), (4, "1f1b"), (4, "zb-h1")])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_the_peak_of_a_step_is_that_of_the_formula(kind: str, stages: int, schedule: str, split: str) -> None:
    for train in RECOMPUTED:
        case = recipe(kind, stages, schedule, SPLITS[split], **train)
        config = case.config(model__kernels="fused")
        stage = min(1, stages - 1)
        run = run_rank(config, case.layout, stage * case.tensor, VOCAB)
        assert run.activations == pytest.approx(peak(config, stage), rel=0.05), train


@pytest.mark.parametrize(
    ("kind", "split", "stages", "schedule", "train"),
    [
        ("gpt", "one rank", 1, "1f1b", {}),
        ("gpt", "one rank", 4, "1f1b", {"recompute": "full"}),
        ("llama", "one rank", 4, "zb-h1", {"recompute": "selective"}),
        ("llama", "sequence", 1, "1f1b", {"recompute": "full", "recompute_every": 2}),
        ("gpt", "sequence", 2, "1f1b", {}),
        ("gpt", "sequence", 1, "1f1b", {"recompute": "selective"}),
    ],
)
def test_so_is_the_peak_of_a_step_of_processes(
    pool: WorkerPool, kind: str, split: str, stages: int, schedule: str, train: dict[str, Any]
) -> None:
    case = recipe(kind, stages, schedule, SPLITS[split], **train)
    short = {"model.sequence": 32, "train.micro_batch": 16, "train.global_batch": 128, "model.flash_attention": False}
    case = replace(case, overrides={**case.overrides, **short})
    config, stage = case.config(), min(1, stages - 1)
    for index, seen in enumerate(pool.run(observe, config, layout=case.layout)):
        if index // case.tensor == stage:
            assert seen.activations == pytest.approx(peak(config, stage, kernels=False), rel=0.05)
