"""While a chunk of tokens is multiplied, the collective of another one is under way, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.tensor_parallel.chunks import Arrival, chunk_sizes
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tests.worker_pool import WorkerPool

INIT = Initializer(seed=1, dtype=torch.float64, device=torch.device("cpu"))
CHUNKS = 3
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


@pytest.mark.parametrize(
    ("rows", "chunks", "sizes"), [(6, 2, [3, 3]), (7, 3, [3, 2, 2]), (2, 5, [1, 1]), (4, 1, [4]), (0, 3, [0])]
)
def test_chunks_are_as_equal_as_may_be(rows: int, chunks: int, sizes: list[int]) -> None:
    assert chunk_sizes(rows, chunks) == sizes


@contextmanager
def noted(events: list[str], layer: Any) -> Iterator[None]:
    """Note each product, each collective's start and each wait for one that was started without waiting."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        events.append("product")
        y = F.linear(x, weight, bias)
        y.register_hook(lambda _: events.append("product"))
        return y

    def starting(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def start(*arguments: Any, **options: Any) -> Any:
            events.append(name if options.get("async_op") else f"blocking {name}")
            return original(*arguments, **options)

        return start

    def wait(self: Arrival, original: Callable[[Arrival], Tensor] = Arrival.wait) -> Tensor:
        if self.work is not None:
            events.append("wait")
        return original(self)

    layer.linear = product
    with mock.patch.object(Arrival, "wait", wait):
        patches = [mock.patch.object(dist, name, starting(getattr(dist, name), name)) for name in COLLECTIVES]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def events_of(mesh: ParallelMesh, kind: type[Any], sequence: bool) -> tuple[list[str], list[str]]:
    layer = kind("l", 12, 12, group=mesh.group("tensor"), init=INIT, std=1.0, bias=False, sequence=sequence)
    layer.chunks = CHUNKS
    tokens = 8 if sequence and kind is ColumnParallelLinear else 16
    x = torch.randn(2, tokens, 12 if kind is ColumnParallelLinear else 6, dtype=torch.float64, requires_grad=True)
    forward: list[str] = []
    with noted(forward, layer):
        y = layer(x)
        forward, both = forward.copy(), forward
        y.sum().backward()
    return forward, both[len(forward) :]


STARTED_FIRST = ["wait", "product"] * CHUNKS


@pytest.mark.parametrize(
    ("kind", "sequence", "forward", "backward"),
    [
        (ColumnParallelLinear, False, ["product"] * 3, ["product", "all_reduce"] * 3 + ["wait"] * 3),
        (RowParallelLinear, False, ["product", "all_reduce"] * 3 + ["wait"] * 3, ["product"] * 3),
        (
            ColumnParallelLinear,
            True,
            ["all_gather_into_tensor"] * 3 + STARTED_FIRST,
            ["product", "reduce_scatter_tensor"] * 3 + ["wait"] * 3,
        ),
        (
            RowParallelLinear,
            True,
            ["product", "reduce_scatter_tensor"] * 3 + ["wait"] * 3,
            ["all_gather_into_tensor"] * 3 + STARTED_FIRST,
        ),
    ],
)
def test_a_collective_is_under_way_during_the_next_product(
    pool: WorkerPool, kind: type[Any], sequence: bool, forward: list[str], backward: list[str]
) -> None:
    for found in pool.run(events_of, kind, sequence, layout=RankLayout(tensor=2)):
        assert found == (forward, backward)
