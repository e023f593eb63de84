"""muP: what changes with the width and what must not; that rates transfer is shown by benchmarks/width_transfer.py."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.models.build import build_stage
from megalm.train.optimizers import treatment
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerPool

VOCAB, BASE = 50, 16


def recipe(width: int, mup: bool = True) -> RunConfig:
    """Heads of 8 features; only their number and the widths grow."""
    model = {"hidden": width, "heads": width // 8, "sequence": 16, "init_std": 0.3, "init_depth_scaled": False}
    return small_recipe(model={**model, **({"mup_base": BASE} if mup else {})})


@pytest.mark.parametrize(
    ("name", "shape", "wide"),
    [
        ("blocks.0.attention.qkv.weight", (192, 64), True),
        ("blocks.1.mlp.up.weight", (2, 256, 64), True),
        ("blocks.1.mlp.up.bias", (256,), False),
        ("blocks.0.attention_norm.weight", (64,), False),
        ("blocks.0.attention.relative.weight", (8, 32), False),
        ("embedding.weight", (50, 64), False),
        ("head.weight", (50, 64), False),
        ("position.weight", (16, 64), False),
    ],
)
def test_matrices_of_blocks_learn_slower_and_decay_no_less_a_step(
    name: str, shape: tuple[int, ...], wide: bool
) -> None:
    config = recipe(64)
    spec = ShardSpec.whole(name, shape)
    decay, rate, _ = treatment(config.optim, spec)
    found_decay, found_rate, _ = treatment(config.optim, spec, config.model.width_factor)
    factor = 4.0 if wide else 1.0
    assert (found_rate, found_decay) == pytest.approx((rate / factor, decay * factor))
    assert treatment(config.optim, spec, recipe(64, mup=False).model.width_factor)[:2] == (decay, rate)


def check_first_values(mesh: ParallelMesh) -> None:
    tokens = torch.arange(16)[None]
    for width in (16, 64):
        plain, scaled = (build_stage(recipe(width, mup), VOCAB, mesh) for mup in (False, True))
        for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
            matrix = name.startswith("blocks") and one.dim() >= 2
            factor = math.sqrt(BASE / width) if matrix else 1.0
            torch.testing.assert_close(other, one * factor, rtol=1e-6, atol=0.0)
        with torch.no_grad():
            for one, other in zip(plain.blocks.parameters(), scaled.blocks.parameters(), strict=True):
                other.copy_(one)
            torch.testing.assert_close(scaled(tokens), plain(tokens) * BASE / width, rtol=1e-4, atol=1e-5)


def test_matrices_start_smaller_and_logits_are_divided_by_the_width(pool: WorkerPool) -> None:
    pool.run(check_first_values, layout=RankLayout())


def test_scores_are_divided_by_the_size_of_a_head_relative_to_the_bases() -> None:
    model = small_recipe(model={"mup_base": BASE, "hidden": 64, "heads": 2, "mup_base_head_dim": 8}).model
    assert model.query_factor / math.sqrt(model.head_size) == pytest.approx(math.sqrt(8) / model.head_size)
    assert recipe(64).model.query_factor == 1.0
