"""A stage's model and its executor from a recipe: the one place that turns config values into their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from megalm.config.model import ModelSection
from megalm.config.run import RunConfig
from megalm.context_parallel.attention import ContextParallel
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.models import offload
from megalm.models.transformer import StagePlan, Transformer
from megalm.pipeline_parallel.executor import PipelineExecutor
from megalm.pipeline_parallel.partition import partition_layers
from megalm.pipeline_parallel.schedules import SCHEDULES, placement_of
from megalm.pipeline_parallel.weight_gradients import WeightGradients
from megalm.tensor_parallel.float8 import Float8Products
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import Linear
from megalm.zero.engine import kept_buffers, shard_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def stage_plan(config: RunConfig, stage: int) -> StagePlan:
    """Return what pipeline stage number `stage` holds."""
    placement = placement_of(config.parallel.schedule, config.parallel.pipeline, config.parallel.virtual_stages)
    layers = partition_layers(config.model.layers, placement, config.parallel.partition)
    places = [placement.place(stage, chunk) for chunk in range(placement.chunks)]
    return StagePlan(
        chunks=tuple(layers[place] for place in places),
        first=stage == 0,
        last=stage == placement.last_stage,
    )


def build_stage(
    config: RunConfig,
    vocab: int,
    mesh: ParallelMesh,
    on_built: Callable[[nn.Module], None] | None = None,
    document_start: int | None = None,
) -> Transformer:
    """Return this rank's part of the model with its initial weights, in the recipe's precision on the mesh's device.

    `vocab` is the tokenizer's size, unpadded, and `document_start` the token that begins a document. `on_built` is
    called with each part once it is there; without it no collective runs. Raises ConfigError where the device, or this
    Python, cannot compute what `train.fp8` asks for.
    """
    products = _float8_products(config)
    if products is not None:
        products.check(mesh.device)
    model = Transformer(
        config.model,
        vocab=vocab,
        plan=stage_plan(config, mesh.coordinates.pipeline),
        group=mesh.group("tensor"),
        init=Initializer(config.seed, DTYPES[config.precision], mesh.device, config.model.init),
        sequence=config.parallel.sequence,
        label_smoothing=config.loss.label_smoothing,
        z_loss=config.loss.z_loss,
        mtp_weight=config.loss.mtp if config.model.mtp_depth else 0.0,
        fused_head=config.loss.fused_head,
        recompute=config.train.recompute,
        recompute_every=config.train.recompute_every,
        document_start=document_start,
        expert_group=mesh.group("expert") if config.parallel.expert > 1 else None,
        on_built=on_built,
        context=ContextParallel(mesh.group("context"), config.parallel.context_attention),
        offload=offload.mover_of(mesh.device) if config.train.offload_activations else None,
    )
    for layer in _linear_layers(model):
        layer.chunks = config.overlap.tensor_chunks
    if products is not None:
        for layer in _linear_layers(model.blocks):
            layer.linear = products.linear
    return model


def _float8_products(config: RunConfig) -> Float8Products | None:
    return None if config.train.fp8 == "none" else Float8Products(config.train.fp8)


def _linear_layers(module: nn.Module) -> Iterator[Linear]:
    return (layer for layer in module.modules() if isinstance(layer, Linear))


def build_executor(config: RunConfig, module: nn.Module, mesh: ParallelMesh) -> PipelineExecutor:
    """Return the executor of this rank's stage for the recipe's schedule.

    Under a schedule that splits the backward pass the linear layers of the blocks are told to put off the gradients of
    their weights, in fp8 or not. Those of the head come at once: what they need is as large as the logits.
    """
    ranks = mesh.size("context") * (mesh.size("tensor") if config.parallel.sequence else 1)
    kind = SCHEDULES.get(config.parallel.schedule)
    schedule = partial(kind, chunks=kind.fixed_chunks or config.parallel.virtual_stages)
    weight_gradients = WeightGradients()
    if kind.splits_backward:
        for layer in _linear_layers(module):
            layer.linear = weight_gradients.linear
        products = _float8_products(config)
        if products is not None:
            for layer in _linear_layers(module.get_submodule("blocks")):
                layer.linear = partial(weight_gradients.linear, products=products)

    def hidden_shape(rows: int, tokens: int) -> tuple[int, int, int]:
        return rows, tokens // ranks, config.model.hidden

    dtype, ahead = DTYPES[config.precision], config.overlap.messages
    return PipelineExecutor(module, schedule, mesh, hidden_shape, dtype, weight_gradients, ahead)


def whole_tensors(model: ModelSection, vocab: int) -> dict[str, ShardSpec]:
    """Return the tensors of a whole model by logical name, from a model on the meta device."""
    kept: dict[str, Any] = {"kernels": "reference", "flash_attention": True}  # the fused ones ask for a device
    if model.position == "rotary":
        kept["sequence"] = 1  # no shape but the tables' depends on it
    training = {"train": {"steps": 1, "global_batch": 1, "micro_batch": 1}, "optim": {"lr": 1.0}}
    config = RunConfig.model_validate({**training, "model": model.model_dump()})
    config = config.model_copy(update={"model": model.model_copy(update=kept)})
    stage = build_stage(config, vocab, ParallelMesh.on_meta(RankLayout(), 0), document_start=0)
    specs = [shard_of(tensor) for tensor in (*stage.parameters(), *kept_buffers(stage))]
    return {spec.name: ShardSpec.whole(spec.name, spec.global_shape) for spec in specs}
