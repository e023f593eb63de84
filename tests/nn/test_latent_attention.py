"""Latent attention with its heads split over ranks against attention one head at a time."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.attention import Attention
from megalm.nn.context import Context
from megalm.tensor_parallel import linear
from tests.nn.layers import INIT, LATENT_MODELS, model_section
from tests.nn.test_attention import check_attention
from tests.shards import fill, random_whole
from tests.worker_pool import WorkerPool


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_latent_attention_matches_one_head_at_a_time_with_rotation_and_dropout(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_attention, LATENT_MODELS, layout=RankLayout(tensor=tensor))


def gathered_widths(mesh: ParallelMesh) -> list[int]:
    widths: list[int] = []
    gather = linear.gather_sequence

    def noted(x: Tensor, group: object) -> Tensor:
        widths.append(x.shape[-1])
        return gather(x, mesh.group("tensor"))

    config = model_section(**LATENT_MODELS[1])
    layer = Attention("blocks.0.attention", 0, config, group=mesh.group("tensor"), init=INIT, sequence=True)
    fill(layer)
    with mock.patch.object(linear, "gather_sequence", noted):
        layer(random_whole("x", (1, 4, 8)), Context(8))
    return widths


def test_under_sequence_parallelism_latents_travel_and_not_the_hidden_state(pool: WorkerPool) -> None:
    for widths in pool.run(gathered_widths, layout=RankLayout(tensor=2)):
        assert widths == [5 + 6 + 4]


def check_heads(mesh: ParallelMesh) -> None:
    config = model_section(**LATENT_MODELS[1])
    layer = Attention("blocks.0.attention", 0, config, group=mesh.group("tensor"), init=INIT, sequence=False)
    fill(layer)
    q, gate, k, v = layer.project(random_whole("x", (2, 8, 8)))
    assert gate is None and q.shape == k.shape == v.shape == (2, 8, 4, 4 + 3)
    assert all(torch.equal(k[:, :, head, :4], k[:, :, 0, :4]) for head in range(4)), "what turns is one for all heads"
    assert not torch.equal(k[:, :, 1], k[:, :, 0])
    assert not v[..., 2:].any() and v[..., :2].all()
    assert layer.out.weight.shape == (8, 4 * 2)


def test_the_turning_part_of_a_key_is_shared_and_values_are_padded(pool: WorkerPool) -> None:
    pool.run(check_heads, layout=RankLayout())
