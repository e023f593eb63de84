"""The MLP with its features split over ranks against its formula."""

from __future__ import annotations

import pytest

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.mlp import ACTIVATIONS, MLP
from tests.nn.dense import formulas
from tests.nn.layers import INIT, check_layer, model_section
from tests.shards import spec_of
from tests.worker_pool import WorkerPool


def check_mlp(mesh: ParallelMesh) -> None:
    for activation in ACTIVATIONS.names():
        for bias in (True, False):
            for sequence in (False, True):
                config = model_section(activation=activation, bias=bias)
                layer = MLP("m", config, group=mesh.group("tensor"), init=INIT, sequence=sequence)
                check_layer(mesh, layer, layer, lambda x, w, c=config: formulas(c, w).mlp(x, "m"), config, sequence)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_mlp_matches_its_formula(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_mlp, layout=RankLayout(tensor=tensor))


def logical_shapes(mesh: ParallelMesh, activation: str) -> dict[str, tuple[int, ...]]:
    config = model_section(activation=activation)
    layer = MLP("m", config, group=mesh.group("tensor"), init=INIT, sequence=False)
    return {spec_of(p).name: spec_of(p).global_shape for p in layer.parameters()}


def test_gate_and_value_are_one_logical_tensor(pool: WorkerPool) -> None:
    down = {"m.down.weight": (8, 12), "m.down.bias": (8,)}
    for activation, up in (("gelu", (12,)), ("swiglu", (2, 12)), ("geglu", (2, 12))):
        expected = {"m.up.weight": (*up, 8), "m.up.bias": up, **down}
        assert pool.run(logical_shapes, activation, layout=RankLayout(tensor=2)) == [expected] * 2
