"""A stage's model and its executor from a recipe: the one place that turns config values into their arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.models.transformer import StagePlan, Transformer
from megalm.pipeline_parallel.executor import PipelineExecutor
from megalm.pipeline_parallel.partition import partition_layers
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.tensor_parallel.initialize import Initializer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def stage_plan(config: RunConfig, stage: int) -> StagePlan:
    """Return what pipeline stage number `stage` holds."""
    stages = config.parallel.pipeline
    layers = partition_layers(config.model.layers, stages, config.parallel.partition)[stage]
    return StagePlan(layers=layers, first=stage == 0, last=stage == stages - 1)


def build_stage(
    config: RunConfig,
    vocab: int,
    mesh: ParallelMesh,
    on_built: Callable[[nn.Module], None] | None = None,
    document_start: int | None = None,
) -> Transformer:
    """Return this rank's part of the model with its initial weights, in the recipe's precision on the mesh's device.

    `vocab` is the tokenizer's size, unpadded, and `document_start` the token that begins a document. `on_built` is
    called with each part once it is there; without it no collective runs.
    """
    return Transformer(
        config.model,
        vocab=vocab,
        plan=stage_plan(config, mesh.coordinates.pipeline),
        group=mesh.group("tensor"),
        init=Initializer(config.seed, DTYPES[config.precision], mesh.device, config.model.init),
        sequence=config.parallel.sequence,
        label_smoothing=config.loss.label_smoothing,
        z_loss=config.loss.z_loss,
        fused_head=config.loss.fused_head,
        recompute=config.train.recompute,
        recompute_every=config.train.recompute_every,
        document_start=document_start,
        on_built=on_built,
    )


def build_executor(config: RunConfig, module: nn.Module, mesh: ParallelMesh) -> PipelineExecutor:
    """Return the executor of this rank's stage for the recipe's schedule."""
    ranks = mesh.size("tensor") if config.parallel.sequence else 1
    schedule = SCHEDULES.get(config.parallel.schedule)

    def hidden_shape(rows: int, tokens: int) -> tuple[int, int, int]:
        return rows, tokens // ranks, config.model.hidden

    return PipelineExecutor(module, schedule, mesh, hidden_shape, DTYPES[config.precision])
