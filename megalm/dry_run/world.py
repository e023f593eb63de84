"""A world of which one rank runs, and no other: groups form, collectives return at once and move nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh


@contextmanager
def pretended_mesh(layout: RankLayout, rank: int) -> Iterator[ParallelMesh]:
    """Give the mesh of one rank of a layout, on the meta device, as if all others were there.

    Its groups are torch's back end "fake" over a FakeStore, which torch 2.13 keeps for its own tests: no public one
    forms groups of thousands of ranks in one process. `ParallelMesh.on_meta` forms none, and so needs neither, but its
    groups cannot be called.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        yield ParallelMesh.create(layout, torch.device("meta"))
    finally:
        dist.destroy_process_group()
