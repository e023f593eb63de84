"""What joins a block of further tokens to the model, over tensor ranks, against whole weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.multi_token import TokenJoin, tokens_ahead
from tests.nn.dense import formulas
from tests.nn.layers import GPT, INIT, LLAMA, ROWS, check_layer, model_section, tokens_here
from tests.parity.reference_model import Weights
from tests.shards import random_whole
from tests.worker_pool import WorkerPool


def test_what_lies_behind_a_row_is_zero_and_counts_not() -> None:
    row_BT = torch.tensor([[5, 6, 7]])
    assert tokens_ahead(row_BT, 1).tolist() == [[6, 7, 0]]
    assert tokens_ahead(row_BT, 2).tolist() == [[7, 0, 0]]
    assert tokens_ahead(row_BT, 7).tolist() == [[0, 0, 0]]
    assert tokens_ahead(torch.tensor([[True, True, False]]), 1).tolist() == [[True, False, False]]


def check_join(mesh: ParallelMesh) -> None:
    for values, sequence in itertools.product((GPT, LLAMA), {False, mesh.size("tensor") > 1}):
        config = model_section(**values, mtp_depth=1)
        join = TokenJoin(2, config, group=mesh.group("tensor"), init=INIT, sequence=sequence)
        embedded = random_whole("embedded", (ROWS, config.sequence, config.hidden))

        def call(x: Tensor, join: TokenJoin = join, embedded: Tensor = embedded, sequence: bool = sequence) -> Tensor:
            return join.final_norm(join(x, tokens_here(embedded, mesh, sequence)))

        def formula(x: Tensor, w: Weights, embedded: Tensor = embedded, config=config) -> Tensor:  # type: ignore[no-untyped-def]
            layers, name = formulas(config, w), "blocks.2.mtp"
            parts = layers.norm(x, f"{name}.hidden_norm"), layers.norm(embedded, f"{name}.embedding_norm")
            return layers.norm(torch.cat(parts, dim=-1) @ w[f"{name}.project.weight"].T, f"{name}.final_norm")

        check_layer(mesh, join, call, formula, config, sequence)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_join_is_a_projection_of_both_norms_on_any_number_of_ranks(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_join, layout=RankLayout(tensor=tensor))
