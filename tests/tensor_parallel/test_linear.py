"""Column- and row-parallel layers against one dense linear layer, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tests.shards import assert_close, assert_gradients_close, fill, random_whole
from tests.worker_pool import WorkerPool

INIT = Initializer(seed=1, dtype=torch.float64, device=torch.device("cpu"))
ROWS, TOKENS, WIDTH = 2, 8, 6


def dense(x: Tensor, wholes: dict[str, Tensor]) -> Tensor:
    """Return x W^T + b; a weight [parts, F, D] gives [..., parts, F]."""
    y = torch.einsum("btd,...fd->bt...f", x, wholes["l.weight"])
    return y + wholes["l.bias"] if "l.bias" in wholes else y


def mine(x: Tensor, mesh: ParallelMesh, dim: int) -> Tensor:
    """Return this tensor rank's part of x along a dim, zero-padded where the ranks do not divide it."""
    count = mesh.size("tensor")
    length = -(-x.shape[dim] // count)
    shape = (*x.shape[:dim], length * count - x.shape[dim], *x.shape[dim + 1 :])
    return torch.cat((x, x.new_zeros(shape)), dim).narrow(dim, mesh.index("tensor") * length, length)


def check_column(mesh: ParallelMesh, features: int, chunks: int = 1) -> None:
    for parts in (1, 2, 3):
        for bias in (True, False):
            for sequence in (False, True):
                layer = ColumnParallelLinear(
                    "l", WIDTH, features, group=mesh.group("tensor"), init=INIT, std=1.0, bias=bias,
                    sequence=sequence, parts=parts,
                )  # fmt: skip
                layer.chunks = chunks
                wholes = fill(layer)
                x = random_whole("x", (ROWS, TOKENS, WIDTH)).requires_grad_()
                expected = dense(x, wholes)
                dy = random_whole("dy", tuple(expected.shape))
                expected.backward(dy)
                assert x.grad is not None
                own = (mine(x.detach(), mesh, 1) if sequence else x.detach()).clone().requires_grad_()
                y = layer(own)
                last = expected.dim() - 1
                assert_close(y, mine(expected, mesh, last).flatten(2), "output")
                y.backward(mine(dy, mesh, last).flatten(2))
                assert own.grad is not None
                assert_close(own.grad, mine(x.grad, mesh, 1) if sequence else x.grad, "input gradient")
                assert_gradients_close(layer, wholes)


def check_row(mesh: ParallelMesh, features: int, chunks: int = 1) -> None:
    for bias in (True, False):
        for sequence in (False, True):
            layer = RowParallelLinear(
                "l", features, WIDTH, group=mesh.group("tensor"), init=INIT, std=1.0, bias=bias, sequence=sequence
            )
            layer.chunks = chunks
            wholes = fill(layer)
            x = random_whole("x", (ROWS, TOKENS, features)).requires_grad_()
            expected = dense(x, wholes)
            dy = random_whole("dy", tuple(expected.shape))
            expected.backward(dy)
            assert x.grad is not None
            own = mine(x.detach(), mesh, 2).clone().requires_grad_()
            y = layer(own)
            assert_close(y, mine(expected, mesh, 1) if sequence else expected, "output")
            y.backward(mine(dy, mesh, 1) if sequence else dy)
            assert own.grad is not None
            assert_close(own.grad, mine(x.grad, mesh, 2), "input gradient")
            assert_gradients_close(layer, wholes)


def check_both(mesh: ParallelMesh, features: int, chunks: int = 1) -> None:
    check_column(mesh, features, chunks)
    check_row(mesh, features, chunks)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_column_and_row_parallel_match_dense_linear(pool: WorkerPool, tensor: int) -> None:
    """With bias and without, one part and several, tokens replicated and split: outputs and all gradients."""
    pool.run(check_both, 12, layout=RankLayout(tensor=tensor))


def test_column_parallel_matches_dense_linear_where_features_do_not_divide(pool: WorkerPool) -> None:
    pool.run(check_column, 11, layout=RankLayout(tensor=2))


@pytest.mark.parametrize(("tensor", "chunks"), [(1, 2), (2, 2), (2, 3), (2, 100), (4, 3)])
def test_tokens_in_chunks_match_dense_linear(pool: WorkerPool, tensor: int, chunks: int) -> None:
    """16 rows, or 16 / tensor of a rank's own, in as equal chunks as may be, at most as many as there are rows."""
    pool.run(check_both, 12, chunks, layout=RankLayout(tensor=tensor))


def specs(mesh: ParallelMesh) -> list[tuple[str, int | None, int, int]]:
    group = mesh.group("tensor")
    column = ColumnParallelLinear("c", 6, 8, group=group, init=INIT, std=1.0, bias=True, parts=2)
    row = RowParallelLinear("r", 8, 6, group=group, init=INIT, std=1.0, bias=True)
    parameters = [*column.parameters(), *row.parameters()]
    return [(p.shard.name, p.shard.dim, p.shard.start, p.shard.length) for p in parameters]


def test_each_part_is_split_by_itself_and_a_row_parallel_bias_is_whole(pool: WorkerPool) -> None:
    for rank, found in enumerate(pool.run(specs, layout=RankLayout(tensor=2))):
        assert found == [
            ("c.weight", 1, 4 * rank, 4), ("c.bias", 1, 4 * rank, 4), ("r.weight", 1, 4 * rank, 4),
            ("r.bias", None, 0, 0),
        ]  # fmt: skip
