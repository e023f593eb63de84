"""Messages between pipeline stages: values, order, both directions at once, senders that run ahead."""

from __future__ import annotations

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.p2p import StageLinks
from tests.worker_pool import WorkerPool

SHAPE = (2, 3, 4)


def message(kind: int, stage: int, index: int) -> torch.Tensor:
    return torch.full(SHAPE, float(100 * kind + 10 * stage + index), dtype=torch.float64)


def exchange(mesh: ParallelMesh, count: int) -> int:
    """All activations first, then all gradients, as in GPipe; receives are posted before they are needed."""
    links, stage = StageLinks(mesh), mesh.coordinates.pipeline
    activations = [] if mesh.is_first_stage else [links.receive_forward(SHAPE, torch.float64) for _ in range(count)]
    gradients = [] if mesh.is_last_stage else [links.receive_backward(SHAPE, torch.float64) for _ in range(count)]
    for index in range(count):
        if not mesh.is_first_stage:
            assert torch.equal(activations[index].wait(), message(1, stage - 1, index))
        if not mesh.is_last_stage:
            # Not contiguous, with a gradient, and freed by the caller at once.
            links.send_forward(message(1, stage, index).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_())
    for index in range(count):
        if not mesh.is_last_stage:
            assert torch.equal(gradients[index].wait(), message(2, stage + 1, index))
        if not mesh.is_first_stage:
            links.send_backward(message(2, stage, index))
    links.drain()
    return count


@pytest.mark.parametrize("layout", [RankLayout(2, 1, 1), RankLayout(4, 1, 1), RankLayout(2, 2, 1)], ids=str)
def test_messages_arrive_in_order_in_both_directions(pool: WorkerPool, layout):
    assert pool.run(exchange, 9, layout=layout) == [9] * layout.world_size


def send_and_receive_at_once(mesh: ParallelMesh) -> list[float]:
    """Both neighbours send before they receive: nothing may wait for the other side."""
    links = StageLinks(mesh)
    if mesh.is_first_stage:
        links.send_forward(torch.ones(1 << 20))
        got = links.receive_backward((1 << 20,), torch.float32).wait()
    else:
        links.send_backward(torch.full((1 << 20,), 2.0))
        got = links.receive_forward((1 << 20,), torch.float32).wait()
    links.drain()
    return [got.min().item(), got.max().item()]


def test_sends_do_not_wait_for_the_receiver(pool: WorkerPool):
    assert pool.run(send_and_receive_at_once, layout=RankLayout(2, 1, 1)) == [[2.0, 2.0], [1.0, 1.0]]


def off_the_end(mesh: ParallelMesh) -> str:
    try:
        StageLinks(mesh).send_forward(torch.ones(1))
    except AssertionError as error:
        return str(error)
    return ""


def test_a_single_stage_has_no_neighbours(pool: WorkerPool):
    assert pool.run(off_the_end, layout=RankLayout(1, 1, 1)) == ["this stage has no next stage"]
