"""Messages between pipeline stages: values, order, both directions at once, senders that run ahead."""

from __future__ import annotations

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import CARGOES, Cargo, ParallelMesh
from megalm.distributed.p2p import Receipt, Route, StageLinks
from tests.worker_pool import WorkerPool

SHAPE = (2, 3, 4)


def message(kind: int, stage: int, index: int) -> torch.Tensor:
    return torch.full(SHAPE, float(100 * kind + 10 * stage + index), dtype=torch.float64)


def exchange(mesh: ParallelMesh, count: int) -> int:
    """All activations first, then all gradients, as in GPipe; receives are posted before they are needed."""
    links, stage = StageLinks(mesh), mesh.coordinates.pipeline

    def receive(cargo: Cargo, there: int) -> Receipt:
        return links.receive(cargo, there, SHAPE, torch.float64)

    activations = [] if mesh.is_first_stage else [receive("activation", stage - 1) for _ in range(count)]
    gradients = [] if mesh.is_last_stage else [receive("gradient", stage + 1) for _ in range(count)]
    for index in range(count):
        if not mesh.is_first_stage:
            assert torch.equal(activations[index].wait(), message(1, stage - 1, index))
        if not mesh.is_last_stage:
            # Not contiguous, with a gradient, and freed by the caller at once.
            x = message(1, stage, index).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
            links.send("activation", stage + 1, x)
    for index in range(count):
        if not mesh.is_last_stage:
            assert torch.equal(gradients[index].wait(), message(2, stage + 1, index))
        if not mesh.is_first_stage:
            links.send("gradient", stage - 1, message(2, stage, index))
    links.drain()
    return count


@pytest.mark.parametrize("layout", [RankLayout(2, 1, 1), RankLayout(4, 1, 1), RankLayout(2, 2, 1)], ids=str)
def test_messages_arrive_in_order_in_both_directions(pool: WorkerPool, layout):
    assert pool.run(exchange, 9, layout=layout) == [9] * layout.world_size


def send_and_receive_at_once(mesh: ParallelMesh) -> list[float]:
    """Both neighbours send before they receive: nothing may wait for the other side."""
    links = StageLinks(mesh)
    if mesh.is_first_stage:
        links.send("activation", 1, torch.ones(1 << 20))
        got = links.receive("gradient", 1, (1 << 20,), torch.float32).wait()
    else:
        links.send("gradient", 0, torch.full((1 << 20,), 2.0))
        got = links.receive("activation", 0, (1 << 20,), torch.float32).wait()
    links.drain()
    return [got.min().item(), got.max().item()]


def test_sends_do_not_wait_for_the_receiver(pool: WorkerPool):
    assert pool.run(send_and_receive_at_once, layout=RankLayout(2, 1, 1)) == [[2.0, 2.0], [1.0, 1.0]]


def off_the_end(mesh: ParallelMesh) -> str:
    try:
        StageLinks(mesh).send("activation", 1, torch.ones(1))
    except AssertionError as error:
        return str(error)
    return ""


def test_a_single_stage_has_no_neighbours(pool: WorkerPool):
    assert pool.run(off_the_end, layout=RankLayout(1, 1, 1)) == ["this stage sends no activation to stage 1"]


def ring(mesh: ParallelMesh) -> None:
    """Both cargoes go round in both directions, several at once on the same pair of stages."""
    stage, stages = mesh.coordinates.pipeline, mesh.layout.pipeline
    neighbours = {(stage + 1) % stages, (stage - 1) % stages}
    pairs = [(s, (s + step) % stages) for s in range(stages) for step in (1, -1)]
    links = StageLinks(mesh, [Route(cargo, *pair) for cargo in CARGOES for pair in pairs])
    links.allow(1)
    for index in range(5):
        ways = [(cargo, there) for cargo in CARGOES for there in neighbours]
        coming = [links.receive(cargo, there, SHAPE, torch.float64) for cargo, there in ways]
        for cargo, there in ways:
            links.send(cargo, there, message(CARGOES.index(cargo), stage, index))
        for (cargo, there), receipt in zip(ways, coming, strict=True):
            assert torch.equal(receipt.wait(), message(CARGOES.index(cargo), there, index))
    links.drain()


@pytest.mark.parametrize("layout", [RankLayout(2, 1, 1), RankLayout(4, 1, 1), RankLayout(2, 2, 1)], ids=str)
def test_routes_in_a_ring_keep_their_messages_apart(pool: WorkerPool, layout):
    pool.run(ring, layout=layout)
