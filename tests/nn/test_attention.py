"""Attention with its heads split over ranks against attention one head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import whole
from megalm.nn.attention import Attention
from megalm.nn.context import Context
from megalm.nn.masks import DropoutKeys
from megalm.nn.positions import POSITIONS
from tests.nn.dense import formulas
from tests.nn.layers import INIT, MODELS, check_layer, model_section
from tests.shards import fill, random_whole
from tests.worker_pool import WorkerPool

ONE_DOCUMENT = torch.ones(2, 8, dtype=torch.int64)
KEYS = DropoutKeys(seed=5, step=2, first_sample=3)


def check_attention(mesh: ParallelMesh, models: Sequence[dict[str, Any]] = MODELS) -> None:
    for values in models:
        for dropout in (0.0, 0.3):
            for sequence in (False, True) if mesh.size("tensor") > 1 else (False,):
                config = model_section(**values, dropout=dropout)
                group = mesh.group("tensor")
                layer = Attention("blocks.0.attention", 0, config, group=group, init=INIT, sequence=sequence)
                position = POSITIONS.get(config.position)(config, embeds=False, group=None, init=INIT)
                context = Context(config.sequence, rotate=position.rotation(whole(config.sequence)), dropout=KEYS)
                check_layer(
                    mesh,
                    layer,
                    lambda x, layer=layer, context=context: layer(x, context),
                    lambda x, w, config=config: formulas(config, w, KEYS).attention(x, 0, ONE_DOCUMENT),
                    config,
                    sequence,
                )


@pytest.mark.parametrize("tensor", [1, 2])
def test_attention_matches_one_head_at_a_time_with_grouped_queries_rotation_and_dropout(
    pool: WorkerPool, tensor: int
) -> None:
    pool.run(check_attention, layout=RankLayout(tensor=tensor))


def check_causal(mesh: ParallelMesh) -> None:
    config = model_section()
    layer = Attention("blocks.0.attention", 0, config, group=mesh.group("tensor"), init=INIT, sequence=False)
    fill(layer)
    x = random_whole("x", (1, 8, 8)).requires_grad_()
    y = layer(x, Context(8))
    for token in range(8):
        (gradient,) = torch.autograd.grad(y[0, token].sum(), x, retain_graph=True)
        touched = gradient[0].abs().sum(1) > 0
        assert touched.tolist() == [other <= token for other in range(8)]


def test_a_token_sees_itself_and_all_earlier_tokens_and_no_later_one(pool: WorkerPool) -> None:
    pool.run(check_causal, layout=RankLayout())


def check_evaluation(mesh: ParallelMesh) -> None:
    dropping, plain = model_section(dropout=0.5), model_section()
    x = random_whole("x", (1, 8, 8))
    outputs = []
    for config in (dropping, plain):
        layer = Attention("blocks.0.attention", 0, config, group=mesh.group("tensor"), init=INIT, sequence=False)
        fill(layer)
        outputs.append(layer(x, Context(8)))
    assert torch.equal(*outputs)


def test_without_keys_nothing_is_dropped(pool: WorkerPool) -> None:
    pool.run(check_evaluation, layout=RankLayout())
