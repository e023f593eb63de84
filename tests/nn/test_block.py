"""A whole block over several ranks against its formula, with dropout and sequence parallelism."""

from __future__ import annotations

import pytest

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.block import TransformerBlock
from megalm.nn.dropout import DropoutKeys
from megalm.nn.positions import POSITIONS
from tests.nn import dense
from tests.nn.layers import INIT, MODELS, check_layer, model_section
from tests.worker_pool import WorkerPool

KEYS = DropoutKeys(seed=5, step=2, first_sample=1)


def check_block(mesh: ParallelMesh) -> None:
    tensor = mesh.size("tensor")
    for values in MODELS:
        for keys in (KEYS, None):
            for sequence in (False, True) if tensor > 1 else (False,):
                config = model_section(**values, dropout=0.3)
                block = TransformerBlock(3, config, group=mesh.group("tensor"), init=INIT, sequence=sequence)
                position = POSITIONS.get(config.position)(config, embeds=False, group=None, init=INIT)
                rotate = position.rotation(config.sequence)
                first = mesh.index("tensor") * config.sequence // tensor if sequence else 0
                check_layer(
                    mesh,
                    block,
                    lambda x, b=block, r=rotate, k=keys, f=first, c=config: b(x, r, k, f, c.sequence),
                    lambda x, w, c=config, k=keys: dense.block(x, w, "blocks.3", c, k),
                    config,
                    sequence,
                )


@pytest.mark.parametrize("tensor", [1, 2])
def test_block_matches_its_formula(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_block, layout=RankLayout(tensor=tensor))
