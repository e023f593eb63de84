"""One flipped bit in what data ranks hold alike is found, and the rank that has it is named."""

from __future__ import annotations

import random
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import CorruptionError
from megalm.train.replicas import CompareReplicas, checksum, compare, odd_ones_out
from tests.parity.harness import Case, build_trainer
from tests.worker_pool import WorkerPool

SMALL: dict[str, Any] = {
    "model.layers": 2, "model.hidden": 8, "model.heads": 2, "model.sequence": 8,
    "train.global_batch": 6, "train.micro_batch": 1,
}  # fmt: skip
FLIPS = 20


def flip(tensor: torch.Tensor, element: int, bit: int) -> None:
    words = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    size = 8 * words.element_size()
    words[element] ^= -(1 << bit) if bit == size - 1 else 1 << bit


def check_flips(mesh: ParallelMesh, overrides: dict[str, Any]) -> int:
    layout = mesh.layout
    config = Case(layout.pipeline, layout.data, layout.tensor, {**SMALL, **overrides}).config(
        precision=overrides.get("precision", "fp32")
    )
    trainer = build_trainer(mesh, config)
    watch = CompareReplicas(1)
    for _ in range(2):
        watch.after_step(trainer, trainer.train_step())
    with pytest.MonkeyPatch.context() as patch:  # each rank has as many sums as tensors, and a world many ranks
        for name in ("all_gather", "all_gather_into_tensor"):
            patch.setattr(dist, name, lambda *_, **__: pytest.fail("gathered though nothing differs"))
        compare(trainer)
    found = 0
    for number in range(FLIPS):
        choose = random.Random(number)  # the stages hold different tensors, and draw differently from here on
        rank = choose.randrange(layout.world_size)
        name, tensor = choose.choice(list(trainer.engine.replicas()))
        element, bit = choose.randrange(tensor.numel()), choose.randrange(8 * tensor.element_size())
        if mesh.rank == rank:
            flip(tensor, element, bit)
        with pytest.raises(CorruptionError) as caught:
            compare(trainer)
        where = name if mesh.rank == rank else ""
        found += f"replicas differ: rank {rank} on {socket.gethostname()} in {where}" in str(caught.value)
        if mesh.rank == rank:
            flip(tensor, element, bit)
        compare(trainer)
    for _, tensor in trainer.engine.replicas():
        if mesh.rank == 1:
            flip(tensor, 0, 5)
    with pytest.raises(CorruptionError) as caught:
        compare(trainer)
    assert str(caught.value).count("rank 1 on") == 4
    return found


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        (RankLayout(data=3), {}),
        (RankLayout(data=3), {"precision": "bf16"}),
        (RankLayout(data=3, tensor=2), {"zero.stage": 1}),
        (RankLayout(data=3, pipeline=2), {"zero.stage": 2}),
    ],
    ids=["d3", "d3-bf16", "t2d3z1", "p2d3z2"],
)
def test_each_flipped_bit_is_found_in_its_rank(pool: WorkerPool, layout: RankLayout, overrides: dict[str, Any]) -> None:
    assert pool.run(check_flips, overrides, layout=layout) == [FLIPS] * layout.world_size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_every_bit_changes_the_sum(dtype: torch.dtype) -> None:
    tensor = torch.randn(7).mul(50).to(dtype)
    before = checksum(tensor)
    bits = tensor.view(torch.uint8)
    for at in range(bits.numel()):
        for bit in range(8):
            bits[at] ^= 1 << bit
            assert checksum(tensor) != before
            bits[at] ^= 1 << bit
    assert checksum(tensor) == before
    assert checksum(tensor[::2]) == checksum(tensor[::2].clone())


def test_the_majority_is_right_and_two_are_no_majority() -> None:
    assert odd_ones_out([[1, 5], [1, 5], [1, 6]], ["a", "b"]) == [([2], "b")]
    assert odd_ones_out([[1, 5], [2, 5]], ["a", "b"]) == [([0, 1], "a")]
    assert odd_ones_out([[1], [1], [2], [2]], ["a"]) == [([0, 1, 2, 3], "a")]
    assert odd_ones_out([[1], [2], [3], [1], [1]], ["a"]) == [([1, 2], "a")]
    assert odd_ones_out([[1, 2], [1, 2]], ["a", "b"]) == []
