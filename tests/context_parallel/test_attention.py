"""Attention over tokens that ranks divide, against attention of whole rows on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.patterns import BlockPattern
from megalm.context_parallel.attention import ContextParallel
from megalm.context_parallel.ring import _Ring
from megalm.context_parallel.ulysses import to_heads, to_tokens
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import select, zigzag
from megalm.nn.masks import Documents, Drop, DropoutKeys, Site, document_starts
from megalm.nn.ops import REFERENCE, Operations, fused_operations
from megalm.nn.pattern_attention import pattern_attention
from tests.shards import assert_close, random_whole
from tests.worker_pool import WorkerPool

ROWS, TOKENS, HEADS, SIZE = 2, 32, 4, 16
NUMBERS = torch.tensor([[0] * 5 + [1] * 20 + [2] * 7, [0] * 17 + [1] * 15])
DROP = Drop(0.3, Site("probabilities"), DropoutKeys(5, 2, 3), 2, 8)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "narrow window": {"window": 3},
    "window over ranks": {"window": 11, "softcap": 2.0},
    "alibi": {"slopes_H": torch.tensor([0.5, 0.2, 0.1, 0.05])},
    "dropout": {"drop": DROP},
    "documents": {"documents": Documents(NUMBERS, document_starts(NUMBERS))},
    "documents and window": {"documents": Documents(NUMBERS, document_starts(NUMBERS)), "window": 6},
    "grouped": {"groups": 2},
    "one key head": {"groups": 1, "drop": DROP},
    "bias": {"bias_HTS": True},
}


def inputs(groups: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = {"q": HEADS, "k": groups, "v": groups}
    return [random_whole(name, (ROWS, TOKENS, n, SIZE)).to(dtype).requires_grad_() for name, n in shapes.items()]


def check(
    mesh: ParallelMesh, kind: str, operations: Operations, dtype: torch.dtype, options: dict[str, Any], limit: float
) -> None:
    """Compare out and lse of this rank's tokens, and all gradients, with those of whole rows."""
    context = ContextParallel(mesh.group("context"), kind)
    places = context.places(TOKENS)
    options = dict(options)
    wholes = inputs(options.pop("groups", HEADS), dtype)
    leaves = list(wholes)
    bias = None
    if options.pop("bias_HTS", False):
        bias = random_whole("bias", (HEADS, TOKENS, TOKENS)).to(dtype).requires_grad_()
        leaves.append(bias)
    dout = random_whole("dout", (ROWS, TOKENS, HEADS, SIZE)).to(dtype)
    dlse = random_whole("dlse", (ROWS, HEADS, TOKENS)).to(torch.promote_types(dtype, torch.float32))
    out, lse = operations.flash_attention(
        *wholes, causal=True, return_lse=True, **options, **({} if bias is None else {"bias_HTS": bias})
    )
    expected = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    own = [select(x.detach(), places).requires_grad_() for x in wholes]
    mine, own_leaves = {**options}, list(own)
    if bias is not None:
        queries = context.queries(TOKENS)
        own_leaves.append(select(bias.detach(), queries).requires_grad_())
        mine["bias_HTS"] = own_leaves[-1]
    attend = context.around(operations.flash_attention, operations)
    found = attend(*own, causal=True, return_lse=True, **mine)
    given = select(dout, places), select(dlse, places, dim=2)
    gradients = list(torch.autograd.grad(found, own_leaves, given))
    assert_close(found[0], select(out, places), f"out on rank {mesh.rank}", limit)
    assert_close(found[1], select(lse, places, dim=2), "lse", limit)
    if bias is not None and kind == "ulysses":
        dist.all_reduce(gradients[-1], group=context.group)
        assert_close(gradients.pop(), expected[-1], "bias", limit)
        expected = expected[:-1]
    for name, one, other in zip(("dq", "dk", "dv", "bias"), gradients, expected, strict=False):
        assert_close(one, select(other, places), name, limit)


def check_all(mesh: ParallelMesh, kind: str) -> None:
    for name, options in OPTIONS.items():
        try:
            check(mesh, kind, REFERENCE, torch.float64, options, 1e-12)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_over_ranks_attend_as_whole_rows(pool: WorkerPool, ranks: int, kind: str) -> None:
    pool.run(check_all, kind, layout=RankLayout(context=ranks))


def check_kernels(mesh: ParallelMesh) -> None:
    for name in ("window over ranks", "documents and window", "one key head", "bias"):
        check(mesh, "ring", fused_operations(), torch.float32, OPTIONS[name], 3e-6)


def test_a_ring_of_kernels_attends_as_whole_rows(pool: WorkerPool) -> None:
    pool.run(check_kernels, layout=RankLayout(context=2))


def check_blocks(mesh: ParallelMesh) -> None:
    """Attention by blocks, which needs whole rows."""
    pattern = BlockPattern(block=4, local=2, stride=3, first=2)
    context = ContextParallel(mesh.group("context"), "ulysses")
    places = context.places(TOKENS)
    wholes = inputs(2, torch.float64)
    out = pattern_attention(*wholes, pattern=pattern, causal=True)
    found = context.around(pattern_attention, REFERENCE)(
        *(select(x, places) for x in wholes), pattern=pattern, causal=True
    )
    assert_close(found, select(out, places), "out")


def test_attention_by_blocks_has_whole_rows(pool: WorkerPool) -> None:
    pool.run(check_blocks, layout=RankLayout(context=2))


def check_places(mesh: ParallelMesh) -> None:
    context = ContextParallel(mesh.group("context"))
    x = random_whole("x", (ROWS, TOKENS, HEADS, 3))
    own = select(x, context.places(TOKENS))
    assert torch.equal(context.whole_rows(own), x)
    heads = to_heads(own, context.group)
    share = HEADS // context.group.size()
    assert torch.equal(heads, x[:, :, mesh.rank * share : (mesh.rank + 1) * share])
    assert torch.equal(to_tokens(heads, context.group), own)


def test_tokens_and_heads_change_places_in_order(pool: WorkerPool) -> None:
    for ranks in (2, 4):
        pool.run(check_places, layout=RankLayout(context=ranks))


def count_pairs(mesh: ParallelMesh, window: int | None) -> list[int]:
    """Return how many parts of the matrix a rank computes at each step."""
    ring = _Ring(REFERENCE, mesh.group("context"), 64, window, None, {})
    return [len(list(ring.pairs(step))) for step in range(mesh.size("context"))]


def test_all_ranks_have_equal_work_and_windows_leave_parts_out(pool: WorkerPool) -> None:
    assert pool.run(count_pairs, None, layout=RankLayout(context=4)) == [[3, 2, 2, 2]] * 4
    found = pool.run(count_pairs, 8, layout=RankLayout(context=4))
    assert sum(map(sum, found)) == 8 + 7  # each of 8 pieces sees itself and the one before


def test_each_token_has_one_rank() -> None:
    for ranks in (1, 2, 3, 4):
        tokens = 24
        held = [torch.arange(tokens)[None] for _ in range(ranks)]
        found = torch.cat([select(x, zigzag(tokens, rank, ranks)) for rank, x in enumerate(held)], dim=1)
        assert sorted(found[0].tolist()) == list(range(tokens))
