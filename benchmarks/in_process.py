"""A recipe's model trained in the benchmark's own process, which is then a world of one."""

from __future__ import annotations

from functools import partial

from megalm.config.run import RunConfig
from megalm.data.datasets import PreparedData
from megalm.data.loader import Loader
from megalm.data.sampler import GlobalOrder
from megalm.distributed.mesh import ParallelMesh
from megalm.models.build import build_executor, build_stage
from megalm.train.optimizers import build_optimizer
from megalm.train.trainer import Trainer, TrainState
from megalm.zero.build import build_engine


def trainer_of(config: RunConfig, data: PreparedData, mesh: ParallelMesh) -> Trainer:
    """Return a trainer of the recipe's model; `engine.module` is the model."""
    model = build_stage(config, data.vocabulary, mesh, document_start=data.end_of_text)
    make_optimizer = partial(build_optimizer, config.optim, width_factor=config.model.width_factor, seed=config.seed)
    engine = build_engine(config, model, mesh, make_optimizer, model.tied_weight)
    windows = data.windows(config.model.sequence, config.data.rows)
    loader = Loader(data.train, windows, GlobalOrder(len(windows), config.seed), 0, 1)
    return Trainer(config, mesh, build_executor(config, engine.module, mesh), engine, loader, TrainState())
