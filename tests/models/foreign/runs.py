"""Imported runs, looked at through megalm's own model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.names import CHECKPOINTS, find_checkpoints
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.trained import trained_config
from megalm.distributed.sharding import ShardSpec
from megalm.distributed.world import joined_mesh
from megalm.models.trained import load_trained


def logits_of(run: Path, tokens_T: Tensor) -> Tensor:
    """Return the logits [T, vocab] that the run's model gives, computed in fp64."""
    config = trained_config(run, ["precision=fp64", "run.device=cpu"])
    assert config.model.vocab is not None
    with joined_mesh(config) as mesh, torch.no_grad():
        trained = load_trained(run, config, config.model.vocab, mesh)
        return trained.model(tokens_T[None])[0, :, : config.model.vocab]


def tensors_of(run: Path, kind: str = "weight") -> dict[str, Tensor]:
    """Return the whole tensors of a kind in the run's newest checkpoint."""
    reader = CheckpointReader(find_checkpoints(run / CHECKPOINTS)[0])
    try:
        shapes = {name: tuple(reader.manifest.tensors[kind, name][0]["shape"]) for name in reader.names(kind)}
        return {name: reader.read_local(ShardSpec.whole(name, shape), kind) for name, shape in shapes.items()}
    finally:
        reader.close()
