"""Each collective and its gradient against plain torch on the joined tensors, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalm.distributed import collectives
from megalm.distributed.collectives import agree
from megalm.errors import ConfigError, DistributedError, LaunchError
from tests.worker_pool import WorkerPool

BATCH, TOKENS, DIM = 3, 4, 5  # tokens per rank


def run_one(rank: int, name: str, dtype: torch.dtype, x: list[torch.Tensor], upstream: list[torch.Tensor]):
    """Return y and dx of one collective of this rank's x, given non-contiguous and checked for changes."""
    mine = x[rank].to(dtype).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    before = mine.detach().clone()
    y = getattr(collectives, name)(mine, dist.group.WORLD)
    gradient = upstream[rank].to(dtype).transpose(0, 2).contiguous().transpose(0, 2)
    kept = gradient.clone()
    y.backward(gradient)
    assert torch.equal(mine.detach(), before) and torch.equal(gradient, kept)
    assert y.dtype == dtype and mine.grad.dtype == dtype
    return y.detach(), mine.grad


def reference(name: str, x: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return every rank's y as a function of every rank's x, all on one process."""
    n = len(x)
    if name in ("copy_to_group", "sum_gradient"):
        return [x[0] for _ in range(n)]  # one logical tensor that all ranks read
    if name == "reduce_from_group":
        return [sum(x)]  # one logical result that all ranks hold
    if name == "gather_sequence":
        return [torch.cat(x, 1) for _ in range(n)]
    assert name == "reduce_scatter_sequence"
    return list(sum(x).chunk(n, 1))


SAME_INPUT = ("copy_to_group", "sum_gradient")
NAMES = (*SAME_INPUT, "reduce_from_group", "gather_sequence", "reduce_scatter_sequence")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_collective_and_gradient_match_the_joined_tensors(pool: WorkerPool, name, world, dtype):
    generator = torch.Generator().manual_seed(7)

    def draw(tokens: int) -> torch.Tensor:
        # Small integers: sums are exact in bfloat16 too, so that one comparison serves both dtypes.
        return torch.randint(-8, 8, (BATCH, tokens, DIM), generator=generator).double()

    tokens_in = TOKENS * world if name == "reduce_scatter_sequence" else TOKENS
    x = [draw(tokens_in) for _ in range(world)]
    if name in SAME_INPUT:
        x = x[:1] * world
    tokens_out = {"gather_sequence": TOKENS * world}.get(name, TOKENS)
    upstream = [draw(tokens_out) for _ in range(world)]
    if name == "reduce_from_group":
        upstream = upstream[:1] * world
    got = pool.run(run_one, name, dtype, x, upstream, world=world)

    leaves = [t.clone().requires_grad_() for t in (x[:1] if name in SAME_INPUT else x)]
    y = reference(name, leaves * world if name in SAME_INPUT else leaves)
    torch.autograd.backward(y, [u.clone() for u in upstream[: len(y)]])
    for rank, (value, gradient) in enumerate(got):
        assert torch.equal(value.double(), y[rank % len(y)].detach())
        assert torch.equal(gradient.double(), leaves[rank % len(leaves)].grad)


def run_alone(rank: int) -> bool:
    x = torch.ones(2, 3, 4, requires_grad=True)
    return all(getattr(collectives, name)(x, dist.group.WORLD) is x for name in NAMES)


def test_a_group_of_one_adds_no_node(pool: WorkerPool):
    assert pool.run(run_alone, world=1) == [True]


def run_plain(rank: int):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t() * (rank + 1)
    before, group = x.clone(), dist.group.WORLD
    total, largest = collectives.all_reduce_sum(x, group), collectives.all_reduce_max(-x, group)
    assert torch.equal(x, before)
    return total, largest


def test_reductions_outside_of_autograd(pool: WorkerPool):
    whole = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    for total, largest in pool.run(run_plain, world=3):
        assert torch.equal(total, 6 * whole)
        assert torch.equal(largest, -whole)


def run_agree(rank: int, errors: dict[int, BaseException]):
    try:
        agree(errors.get(rank), dist.group.WORLD)
    except Exception as raised:
        return type(raised), str(raised)
    return None


@pytest.mark.parametrize(
    ("errors", "kind", "message"),
    [
        ({2: ConfigError("model.heads=7 is odd; use 8")}, ConfigError, "rank 2: model.heads=7 is odd; use 8"),
        ({1: LaunchError("a"), 2: ConfigError("b")}, LaunchError, "rank 1: a"),
        ({0: ValueError("two\nlines")}, DistributedError, "rank 0: ValueError: two lines"),
        ({1: KeyboardInterrupt()}, DistributedError, "rank 1: KeyboardInterrupt: "),
        ({1: ConfigError("😀é" * 9000)}, ConfigError, None),
    ],
)
def test_all_ranks_raise_the_first_failing_rank_s_error(pool: WorkerPool, errors, kind, message):
    answers = pool.run(run_agree, errors, world=3)
    assert len(set(answers)) == 1
    assert answers[0][0] is kind
    assert message is None or answers[0][1] == message


def test_nobody_raises_when_all_is_well(pool: WorkerPool):
    assert pool.run(run_agree, {}, world=3) == [None] * 3
    assert pool.run(run_agree, {0: ConfigError("alone")}, world=1) == [(ConfigError, "alone")]


def exchange(rank: int, counts: list[list[int]]) -> None:
    """Rank r sends counts[r][s] rows, which say where they come from and go to, to rank s."""
    sent, came = counts[rank], [row[rank] for row in counts]
    rows = [[rank, to, n] for to, count in enumerate(sent) for n in range(count)]
    x = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).requires_grad_()
    y = collectives.exchange_rows(x, sent, came, dist.group.WORLD)
    expected = [[sender, rank, n] for sender, count in enumerate(came) for n in range(count)]
    assert y.tolist() == expected
    y.backward(10.0 * y.detach())
    assert torch.equal(x.grad, 10.0 * x.detach())


@pytest.mark.parametrize("counts", [[[3]], [[1, 2], [0, 3]], [[0, 0], [2, 0]], [[0, 1, 2], [3, 0, 1], [0, 0, 2]]])
def test_rows_go_where_they_are_sent_and_their_gradients_come_back(pool: WorkerPool, counts) -> None:
    pool.run(exchange, counts, world=len(counts))
