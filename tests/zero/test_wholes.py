"""Matrices that lie in parts come to their owners whole, and back; the work is shared out by cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.zero import wholes
from megalm.zero.parts import Part
from megalm.zero.wholes import Slab, Wholes, deal
from tests.shards import part_of, random_whole
from tests.worker_pool import WorkerPool

# Name: shape and the dim that tensor ranks split; 7 rows and 7 columns do not divide.
WEIGHTS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "rows": ((7, 5), 0), "columns": ((4, 7), 1), "shared": ((6, 3), None), "gated": ((2, 9, 4), 1),
    "large": ((16, 12), 0), "experts": ((3, 2, 4, 7), 3), "small": ((1, 1), None),
}  # fmt: skip


def squared(name: str) -> Tensor:
    """Return what becomes of a weight."""
    whole = random_whole(name, WEIGHTS[name][0])
    return torch.stack([work(slab) for slab in whole.flatten(0, -3)]).view_as(whole) if whole.dim() > 2 else work(whole)


def work(slab: Tensor) -> Tensor:
    """Return something that depends on all of a slab."""
    return slab * slab.norm() + slab.sum(0, keepdim=True) - slab.sum(1, keepdim=True)


def parts_of(mesh: ParallelMesh, divided: bool) -> tuple[list[Part], list[Tensor]]:
    """Return this rank's parts and their values: with `divided` unequal ranges, some ranks having none of a weight."""
    parts, values = [], []
    data, count = mesh.coordinates.data, mesh.size("data")
    for number, (name, (shape, dim)) in enumerate(WEIGHTS.items()):
        spec = ShardSpec.whole(name, shape)
        if dim is not None:
            spec = ShardSpec.split(name, shape, dim, mesh.coordinates.tensor, mesh.size("tensor"))
        flat = part_of(random_whole(name, shape), spec).flatten()
        edges = [0, *(min(len(flat), (7 + number) * rank * rank) for rank in range(1, count)), len(flat)]
        first, last = (edges[data], edges[data + 1]) if divided else (0, len(flat))
        parts.append(Part(spec, 0, first, last - first, True))
        values.append(flat[first:last].clone())
    return parts, values


def check(mesh: ParallelMesh, divided: bool, most: int) -> dict[tuple[str, int], tuple[int, int]]:
    """Have each slab worked on; return its owner here, with how often it was computed in this world."""
    wholes.ROUND_ELEMENTS, before = most, wholes.ROUND_ELEMENTS
    parts, values = parts_of(mesh, divided)
    done: list[Slab] = []

    def compute(slabs: Sequence[tuple[Slab, Tensor]]) -> list[Tensor]:
        done.extend(slab for slab, _ in slabs)
        assert all(tuple(whole.shape) == slab.shape for slab, whole in slabs)
        return [work(whole) for _, whole in slabs]

    try:
        placed = Wholes(parts, mesh, divided, lambda slab: float(slab.shape[0] * slab.shape[1]))
        for _ in range(2):
            again = [value.clone() for value in values]
            placed.transform(again, torch.float64, compute)
            for part, value in zip(parts, again, strict=True):
                expected = part_of(squared(part.shard.name), part.shard).flatten()
                wanted = expected[part.start : part.start + part.length]
                torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=part.shard.name)
    finally:
        wholes.ROUND_ELEMENTS = before
    assert [placed.owners[number] == placed.at for number in range(len(placed.slabs))].count(True) * 2 == len(done)
    return {(slab.shard.name, slab.index): placed.owners[n] for n, slab in enumerate(placed.slabs)}


LAYOUTS = (RankLayout(), RankLayout(data=3), RankLayout(tensor=2), RankLayout(data=2, tensor=3), RankLayout(data=4))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("most", [1, 2**26], ids=["in rounds", "at once"])
def test_each_rank_gets_back_its_part_of_what_became_of_the_whole(
    pool: WorkerPool, layout: RankLayout, divided: bool, most: int
) -> None:
    answers = pool.run(check, divided, most, layout=layout)
    assert all(answer == answers[0] for answer in answers)
    assert len(set(answers[0].values())) == min(layout.world_size, 13), "every rank has work"


def test_work_is_dealt_by_cost_and_always_alike() -> None:
    costs = [1.0, 8.0, 3.0, 3.0, 2.0, 1.0]
    assert deal(costs, 2) == deal(costs, 2)
    loads = [sum(c for c, owner in zip(costs, deal(costs, 2), strict=True) if owner == n) for n in range(2)]
    assert loads == [9.0, 9.0]
    assert deal(costs, 1) == [0] * 6 and sorted(deal(costs, 1000)) == list(range(6))
    assert deal([], 3) == []


def test_a_split_of_a_batch_is_refused() -> None:
    mesh = ParallelMesh.on_meta(RankLayout(tensor=2), 0)
    spec = replace(ShardSpec.split("w", (4, 3, 5), 0, 0, 2))
    with pytest.raises(AssertionError, match="split between"):
        Wholes([Part(spec, 0, 0, 30, True)], mesh, False, lambda slab: 1.0)
