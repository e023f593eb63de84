"""The groups of a running mesh hold the ranks that the layout says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.layout import AXES, RankLayout
from megalm.distributed.mesh import CARGOES, ParallelMesh
from megalm.errors import LaunchError
from tests.worker_pool import WorkerPool

SIZES = [(1, 1, 1), (2, 2, 2), (4, 1, 2), (3, 2, 1), (8, 1, 1), (1, 2, 3), (1, 4, 1), (1, 2, 2, 2, 2), (2, 1, 1, 4, 2)]
LAYOUTS = [RankLayout(*sizes) for sizes in SIZES]


def describe(mesh: ParallelMesh):
    again = ParallelMesh.create(mesh.layout, mesh.device)  # all ranks have formed equally many groups, so this works
    for group in (*mesh.groups.values(), mesh.forward_group, again.backward_group):
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total.item() == group.size()
    return {
        "groups": {axis: dist.get_process_group_ranks(mesh.group(axis)) for axis in AXES},
        "places": {axis: (mesh.index(axis), mesh.size(axis)) for axis in AXES},
        "stages": [dist.get_process_group_ranks(group) for group in (mesh.forward_group, mesh.backward_group)],
        "names": {mesh.forward_group.group_name, mesh.backward_group.group_name, mesh.group("pipeline").group_name},
        "ends": (mesh.is_first_stage, mesh.is_last_stage),
        "stage ranks": [mesh.stage_rank(stage) for stage in range(mesh.layout.pipeline)],
        "text": str(mesh),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_hold_the_layout_s_ranks(pool: WorkerPool, layout):
    for rank, seen in enumerate(pool.run(describe, layout=layout)):
        at = layout.coordinates(rank)
        expected = {axis: layout.group_of(axis, rank) or [rank] for axis in AXES}
        assert seen["groups"] == expected
        assert seen["places"] == {axis: (ranks.index(rank), len(ranks)) for axis, ranks in expected.items()}
        assert seen["stages"] == [expected["pipeline"]] * 2
        assert len(seen["names"]) == (1 if layout.pipeline == 1 else 3)
        stages = expected["pipeline"]
        assert seen["ends"] == (rank == stages[0], rank == stages[-1])
        assert seen["stage ranks"] == stages
        assert (
            seen["text"]
            == f"rank {rank} (pipeline {at.pipeline}, data {at.data}, context {at.context}, tensor {at.tensor})"
        )


def ways(mesh: ParallelMesh) -> list[str]:
    groups = [mesh.message_group(cargo, up) for cargo in CARGOES for up in (True, False)]
    again = [mesh.message_group(cargo, up) for cargo in CARGOES for up in (True, False)]
    assert all(one is other for one, other in zip(groups, again, strict=True))
    assert groups[0] is mesh.forward_group and groups[3] is mesh.backward_group
    stages = dist.get_process_group_ranks(mesh.group("pipeline"))
    assert all(dist.get_process_group_ranks(group) == stages for group in groups)
    return [group.group_name for group in groups]


def test_each_cargo_has_a_group_for_each_direction(pool: WorkerPool):
    for names in pool.run(ways, layout=RankLayout(pipeline=2, data=2)):
        assert len(set(names)) == 4


def create_wrong(rank: int) -> str:
    try:
        ParallelMesh.create(RankLayout(2, 2, 1), torch.device("cpu"))
    except LaunchError as error:
        return str(error)
    return ""


def test_a_world_of_another_size_is_refused(pool: WorkerPool):
    for message in pool.run(create_wrong, world=2):
        assert message.endswith("needs 4 processes, but 2 were started; start 4")
