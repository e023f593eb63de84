"""Experts in checkpoints: pieces that any number of expert, tensor and data ranks wrote, read by any others."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.random import key, normal_shard, words_of_part
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError
from tests.checkpoint.simulated import write_ranks
from tests.shards import part_of, random_whole

NAME, SHAPE, DIM = "blocks.0.mlp.experts.up.weight", (4, 2, 5, 3), 2
WAYS = ((1, 1, 1), (2, 1, 1), (4, 2, 1), (2, 3, 2), (1, 2, 3))
"""Expert, tensor and data ranks; 5 features divide by neither 2 nor 3."""


def specs(experts: int, tensor: int) -> list[ShardSpec]:
    split = [ShardSpec.split(NAME, SHAPE, DIM, index, tensor) for index in range(tensor)]
    return [spec.of_experts(index, experts) for spec in split for index in range(experts)]


def fragments(whole: torch.Tensor, experts: int, tensor: int, data: int) -> list[list[Fragment]]:
    ranks = []
    for spec in specs(experts, tensor):
        flat = part_of(whole, spec).flatten()
        edges = [flat.numel() * index // data for index in range(data + 1)]
        pairs = itertools.pairwise(edges)
        ranks += [[Fragment(spec, "weight", start, flat[start:stop])] for start, stop in pairs]
    return ranks


@pytest.mark.parametrize("written", WAYS, ids=str)
def test_any_division_of_experts_reads_what_any_other_wrote(tmp_path: Path, written: tuple[int, int, int]) -> None:
    whole = random_whole(NAME, SHAPE)
    reader = CheckpointReader(write_ranks(tmp_path, 7, fragments(whole, *written)))
    assert torch.equal(reader.read_local(ShardSpec.whole(NAME, SHAPE), "weight"), whole)
    for experts, tensor, data in WAYS:
        for spec in specs(experts, tensor):
            expected = part_of(whole, spec)
            assert torch.equal(reader.read_local(spec, "weight"), expected)
            edges = [expected.numel() * index // data for index in range(data + 1)]
            for start, stop in itertools.pairwise(edges):
                assert torch.equal(reader.read_flat(spec, "weight", start, stop), expected.flatten()[start:stop])
    reader.close()


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_experts_that_nobody_or_two_write_are_named(tmp_path: Path, change: str) -> None:
    ranks = fragments(random_whole(NAME, SHAPE), 4, 1, 1)
    with pytest.raises(CheckpointError, match="experts"):
        write_ranks(tmp_path, 7, ranks[:2] + ranks[3:] if change == "missing" else [*ranks, ranks[1]])


def test_experts_have_the_same_first_values_and_random_words_however_they_are_divided() -> None:
    stream = key(1, "init", NAME)
    device = torch.device("cpu")
    whole_spec = ShardSpec.split(NAME, SHAPE, DIM, 0, 1)
    whole = normal_shard(whole_spec, stream, 0.5, torch.float64, device)
    words = words_of_part(stream, whole_spec, 0, whole.numel(), device).view(SHAPE)
    for experts, tensor, _ in WAYS:
        for spec in specs(experts, tensor):
            local = normal_shard(spec, stream, 0.5, torch.float64, device)
            assert torch.equal(local, part_of(whole, spec))
            count = local.numel()
            for start, stop in ((0, count), (1, count - 2), (count // 3, count // 2)):
                part = words_of_part(stream, spec, start, stop, device)
                assert torch.equal(part, part_of(words, spec).flatten()[start:stop])
