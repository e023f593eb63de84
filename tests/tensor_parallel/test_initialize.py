"""First values depend on seed, name and global indices alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalm.config.choices import CHOICES
from megalm.distributed.sharding import ShardSpec
from megalm.tensor_parallel.initialize import Initializer
from tests.shards import part_of

CPU = torch.device("cpu")
INIT = Initializer(seed=7, dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("kind", CHOICES["init"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("shape", "dim"), [((67, 6), 0), ((6, 67), 1), ((2, 11, 5), 1)])
def test_a_shard_is_a_slice_of_the_whole_and_its_padding_is_zero(
    shape: tuple[int, ...], dim: int, count: int, kind: str
) -> None:
    init = replace(INIT, kind=kind)
    whole = init.matrix(ShardSpec.whole("w", shape), 0.02).detach()
    for index in range(count):
        spec = ShardSpec.split("w", shape, dim, index, count)
        shard = init.matrix(spec, 0.02)
        assert torch.equal(shard, part_of(whole, spec))
        assert shard.shard == spec and shard.requires_grad  # type: ignore[attr-defined]


def test_a_narrower_dtype_rounds_the_same_numbers() -> None:
    spec = ShardSpec.whole("w", (33, 5))
    wide = INIT.table(spec, 0.02)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(Initializer(7, dtype, CPU).table(spec, 0.02), wide.to(dtype))


def test_seed_and_name_each_give_other_numbers() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return Initializer(seed, torch.float64, CPU).table(ShardSpec.whole(name, (50,)), 1.0)

    assert torch.equal(draw(7, "a.weight"), draw(7, "a.weight"))
    assert not (draw(7, "a.weight") == draw(8, "a.weight")).any()
    assert not (draw(7, "a.weight") == draw(7, "b.weight")).any()


def test_the_spread_is_the_one_asked_for() -> None:
    values = INIT.table(ShardSpec.whole("w", (200, 200)), 0.02).detach()
    assert abs(float(values.mean())) < 5 * 0.02 / 200  # five standard errors
    assert float(values.std()) == pytest.approx(0.02, rel=5 / (2 * 40000) ** 0.5)


@pytest.mark.parametrize(
    ("kind", "std"), [("normal", 0.02), ("truncated_normal", 0.02), ("xavier", (2 / 500) ** 0.5), ("he", 0.1)]
)
def test_matrices_have_the_spread_of_their_kind_and_tables_the_one_asked_for(kind: str, std: float) -> None:
    init, spec = replace(INIT, kind=kind), ShardSpec.whole("w", (2, 300, 200))
    error = 5 / (2 * 120000) ** 0.5
    whole = 0.98658 if kind == "truncated_normal" else 1.0  # what the cut at three deviations leaves
    values = init.matrix(spec, 0.02, shrink=0.5).detach()
    assert float(values.std()) == pytest.approx(0.5 * std * whole, rel=error)
    assert float(init.table(spec, 0.02).detach().std()) == pytest.approx(0.02 * whole, rel=error)
    assert (float(values.abs().max()) <= 3 * 0.5 * std) == (kind == "truncated_normal")


def test_a_constant_fills_the_shard() -> None:
    spec = ShardSpec.split("b", (5,), 0, 1, 2)
    assert INIT.constant(spec, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert INIT.constant(spec, 0.0).shard == spec  # type: ignore[attr-defined]
