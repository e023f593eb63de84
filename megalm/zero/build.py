"""The engine for a recipe's ZeRO stage. DeepSpeed is imported only where a stage above 0 asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalm.config.deepspeed import deepspeed_config
from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.nn.ops import select_operations
from megalm.zero.engine import MakeOptimizer, ZeroEngine


def partitioner(config: RunConfig, mesh: ParallelMesh) -> Callable[[nn.Module], None] | None:
    """Return what is called with each part of a model once it is built: under ZeRO 3, the division of its weights.

    Raises ConfigError for weights that are to travel in 8 bits where there is no GPU.
    """
    if config.zero.stage < 3:
        return None
    _tell_deepspeed_the_device(mesh)
    from megalm.zero.deepspeed_engine import partition_weights

    joined = deepspeed_config(config, mesh.size("data"))
    if joined["zero_optimization"].get("zero_quantized_weights") and mesh.device.type != "cuda":
        raise ConfigError(
            f"zero.config={config.zero.config}: zero_quantized_weights=true needs DeepSpeed's CUDA kernel and this run "
            f"computes on {mesh.device}; use zero3-hpz"
        )
    return lambda module: partition_weights(module, mesh, joined)


def build_engine(
    config: RunConfig,
    module: nn.Module,
    mesh: ParallelMesh,
    make_optimizer: MakeOptimizer,
    tied_weight: Tensor | None,
) -> ZeroEngine:
    """Return the engine that drives `module`'s optimizer. Every rank of the mesh must call.

    Stage 0 is a plain optimizer, which is faster than DeepSpeed's and has nothing to divide; stages 1 to 3 are
    DeepSpeed's with the recipe's JSON.
    """
    if config.zero.stage == 0:
        from megalm.zero.replicated import ReplicatedEngine

        return ReplicatedEngine(
            module,
            mesh,
            make_optimizer,
            tied_weight=tied_weight,
            clip_norm=config.train.clip_grad_norm,
            reduce_dtype={None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[config.train.reduce_dtype],
            grad_norm=select_operations(config.model.kernels, mesh.device).grad_norm,
            overlap=config.overlap.gradients,
        )
    _tell_deepspeed_the_device(mesh)
    from megalm.zero.sharded import ShardedEngine

    return ShardedEngine(
        module,
        mesh,
        make_optimizer,
        tied_weight=tied_weight,
        stage=config.zero.stage,
        deepspeed_config=deepspeed_config(config, mesh.size("data")),
        grad_norm=select_operations(config.model.kernels, mesh.device).grad_norm,
    )


def _tell_deepspeed_the_device(mesh: ParallelMesh) -> None:
    """Say what DeepSpeed would guess, with a warning on every rank that has no GPU, when it is first imported."""
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
