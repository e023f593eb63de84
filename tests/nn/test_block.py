"""A whole block over several ranks against its formula, with dropout and sequence parallelism."""

from __future__ import annotations

import pytest
import torch

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import Run, whole
from megalm.nn.block import TransformerBlock
from megalm.nn.context import Context
from megalm.nn.masks import DropoutKeys
from megalm.nn.positions import POSITIONS
from tests.nn.dense import formulas
from tests.nn.layers import INIT, MODELS, check_layer, model_section
from tests.worker_pool import WorkerPool

ONE_DOCUMENT = torch.ones(2, 8, dtype=torch.int64)
KEYS = DropoutKeys(seed=5, step=2, first_sample=1)


def check_block(mesh: ParallelMesh) -> None:
    tensor = mesh.size("tensor")
    for values in MODELS:
        for keys in (KEYS, None):
            for sequence in (False, True) if tensor > 1 else (False,):
                config = model_section(**values, dropout=0.3)
                block = TransformerBlock(3, config, group=mesh.group("tensor"), init=INIT, sequence=sequence)
                position = POSITIONS.get(config.position)(config, embeds=False, group=None, init=INIT)
                places = whole(config.sequence)
                length = config.sequence // tensor
                held = (Run(mesh.index("tensor") * length, length),) if sequence else places
                context = Context(config.sequence, held, places, position.rotation(places), keys)
                check_layer(
                    mesh,
                    block,
                    lambda x, b=block, context=context: b(x, context),
                    lambda x, w, c=config, k=keys: formulas(c, w, k).block(x, 3, ONE_DOCUMENT),
                    config,
                    sequence,
                )


@pytest.mark.parametrize("tensor", [1, 2])
def test_block_matches_its_formula(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_block, layout=RankLayout(tensor=tensor))
