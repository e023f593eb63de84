"""train.recompute=selective: no bit changes in any layout, and what is made again is made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.nn.norms import Norm
from megalm.tensor_parallel.recomputation import Origin
from tests.parity.harness import LLAMA, Case, train_rank
from tests.parity.options import BALANCED, EXPERTS, LATENT
from tests.worker_pool import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
ZERO3 = str(ROOT / "ds_configs/zero3.json")
DROPOUT: dict[str, Any] = {"model.dropout": 0.1}
SEQUENCE: dict[str, Any] = {"parallel.sequence": True}
CHUNKS: dict[str, Any] = {"overlap.tensor_chunks": 3}
POST: dict[str, Any] = {"model.norm_place": "post"}
OFFLOAD: dict[str, Any] = {"train.offload_activations": True}


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count inputs that are asked for again, and those that are made, inside."""
    counts = {"asked": 0, "made": 0}
    again = Origin.again

    def counted(self: Origin) -> Tensor:
        counts["asked"] += 1
        counts["made"] += self._made is None
        return again(self)

    with mock.patch.object(Origin, "again", counted):
        yield counts


def same_bits(mesh: ParallelMesh, case: Case, precision: str) -> dict[str, int]:
    """Train twice; the gradients of a rank must be those without recomputation. Return the counts of `counting`."""
    keeping = {"train.recompute": "none", "train.recompute_every": 1}
    plain = train_rank(mesh, case.config(precision=precision, **keeping), 2)
    with counting() as counts:
        ours = train_rank(mesh, case.config(precision=precision, **{"train.recompute": "selective"}), 2)
    assert ours.gradients
    for (_, _, one), (_, _, other) in zip(ours.gradients, plain.gradients, strict=True):
        assert torch.equal(one, other)
    assert (ours.losses, ours.norms) == (plain.losses, plain.norms)
    return counts


def without_norms_weights(mesh: ParallelMesh, case: Case) -> int:
    """Return how many inputs are made again where the weights of the norms are gone behind their forward pass."""
    again = Norm.again

    def gone(self: Norm) -> Any:
        weight = self.weight.data
        self.weight.data = torch.empty(0, dtype=weight.dtype)
        make = again(self)
        self.weight.data = weight
        assert make is None
        return make

    with mock.patch.object(Norm, "again", gone):
        return same_bits(mesh, case, "fp64")["made"]


NARROW = [
    Case(1, 1, 2, {**SEQUENCE, **DROPOUT}),
    Case(2, 1, 2, {"parallel.schedule": "zb-h1", **SEQUENCE, **LLAMA}),
    Case(1, 2, 1, {"zero.stage": 3, **DROPOUT}),
]
CASES = [
    Case(1, 1, 1, {**DROPOUT}),
    Case(1, 1, 2, {**SEQUENCE, **DROPOUT}),
    Case(2, 1, 2, {**SEQUENCE, **LLAMA}),
    Case(2, 1, 1, {"parallel.schedule": "zb-h1", **LLAMA, **DROPOUT}),
    Case(1, 1, 1, {"train.recompute_every": 2, "model.flash_attention": False, **DROPOUT}),
    Case(2, 1, 2, {"parallel.schedule": "zb-v", **SEQUENCE, **OFFLOAD}),
    Case(1, 2, 1, {"zero.stage": 3, **DROPOUT}),
    Case(1, 2, 1, {"zero.stage": 3, "zero.config": ZERO3, "model.norm_place": "sandwich"}),
    Case(1, 2, 2, {"zero.stage": 3, **LLAMA, **SEQUENCE}),
    Case(1, 1, 2, {**OFFLOAD, **LLAMA, **SEQUENCE, "model.kv_heads": 1, "model.attention_gate": True}),
    Case(1, 1, 2, {**LATENT, "model.position": "rotary", **SEQUENCE, **DROPOUT}),
    Case(1, 1, 2, {"model.kv_rank": 12, **SEQUENCE, **DROPOUT}),
    Case(1, 1, 2, {**POST, **SEQUENCE, **DROPOUT, "model.activation": "relu2"}),
    Case(1, 1, 2, {"model.norm_place": "sandwich", **SEQUENCE, "model.parallel_residual": True, "model.qk_norm": True}),
    Case(1, 2, 2, {**BALANCED, "parallel.expert": 2, **SEQUENCE}),
    Case(1, 1, 1, {**EXPERTS, **LLAMA, **OFFLOAD}),
    Case(1, 1, 1, {"parallel.context": 2, **LLAMA, **DROPOUT}),
    Case(1, 1, 2, {"parallel.context": 2, "parallel.context_attention": "ulysses", **SEQUENCE, "model.mtp_depth": 1}),
    Case(1, 1, 2, {**CHUNKS, **SEQUENCE, **DROPOUT}),
    Case(1, 1, 2, {**CHUNKS, **LLAMA, **OFFLOAD, "model.kv_heads": 1}),
    Case(2, 1, 2, {**CHUNKS, **LLAMA, **SEQUENCE, "parallel.schedule": "zb-h1"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(str(ROOT), ""))
def test_gradients_are_the_same_bits(pool: WorkerPool, case: Case, precision: str = "fp64") -> None:
    for counts in pool.run(same_bits, case, precision, layout=case.layout):
        assert 0 < counts["made"] <= counts["asked"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_they_are_in_other_precisions_too(pool: WorkerPool, case: Case, precision: str) -> None:
    test_gradients_are_the_same_bits(pool, case, precision)


def test_norms_whose_weights_zero_3_has_divided_again_keep_what_they_made(pool: WorkerPool) -> None:
    case = Case(1, 1, 2, {**SEQUENCE, **DROPOUT})
    assert min(pool.run(without_norms_weights, case, layout=case.layout)) > 0
