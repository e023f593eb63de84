"""Norms against their formulas, also where each rank sees a part of the tokens."""

from __future__ import annotations

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.norms import NORMS
from tests.nn.dense import formulas
from tests.nn.layers import INIT, OPERATIONS, check_layer, model_section
from tests.worker_pool import WorkerPool


def check_norms(mesh: ParallelMesh, sequence: bool) -> None:
    for kind in NORMS.names():
        for bias in (True, False):
            config = model_section(norm=kind, norm_eps=0.1, bias=bias)
            group = mesh.group("tensor") if sequence else None
            norm = NORMS.get(kind)(
                "n", config.hidden, eps=config.norm_eps, bias=bias, group=group, init=INIT, operations=OPERATIONS
            )
            check_layer(mesh, norm, norm, lambda x, w, c=config: formulas(c, w).norm(x, "n"), config, sequence)


def test_norms_match_their_formulas(pool: WorkerPool) -> None:
    pool.run(check_norms, False, layout=RankLayout())


@pytest.mark.parametrize("tensor", [2, 4])
def test_gradients_of_norm_weights_cover_the_tokens_of_all_ranks_under_sequence_parallelism(
    pool: WorkerPool, tensor: int
) -> None:
    pool.run(check_norms, True, layout=RankLayout(tensor=tensor))


def test_a_norm_begins_as_the_plain_normalisation() -> None:
    for kind in NORMS.names():
        norm = NORMS.get(kind)("n", 5, eps=1e-5, bias=True, group=None, init=INIT, operations=OPERATIONS)
        assert torch.equal(norm.weight, torch.full((5,), norm.first_weight, dtype=torch.float64))
        assert norm.first_weight == float(kind != "rmsnorm_zero_centered")
        assert norm.bias is None or not norm.bias.any()


def test_only_layernorm_has_a_bias_and_only_where_the_recipe_has_biases() -> None:
    def names(kind: str, bias: bool) -> list[str]:
        norm = NORMS.get(kind)(
            "blocks.3.mlp_norm", 5, eps=1e-5, bias=bias, group=None, init=INIT, operations=OPERATIONS
        )
        return [parameter.shard.name for parameter in norm.parameters()]  # type: ignore[attr-defined]

    assert names("layernorm", True) == ["blocks.3.mlp_norm.weight", "blocks.3.mlp_norm.bias"]
    for kind, bias in (("layernorm", False), ("rmsnorm", True), ("rmsnorm", False)):
        assert names(kind, bias) == ["blocks.3.mlp_norm.weight"]
