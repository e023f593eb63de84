"""A trained model from its run's directory, in any layout: what evaluation and generation start from.

Owns reading the newest checkpoint's weights into a stage that only runs forward. The recipe is from
`config.trained`; where a layout's processes come from is left to the caller.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.checkpoint.manager import Load, latest_checkpoint
from megalm.checkpoint.names import CHECKPOINTS, find_checkpoints, step_of
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import RunConfig
from megalm.distributed.exchange import Group, together
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.errors import CheckpointError
from megalm.models.build import build_executor, build_stage
from megalm.models.transformer import Transformer
from megalm.pipeline_parallel.executor import PipelineExecutor
from megalm.zero.engine import kept_buffers, shard_of


@dataclass(frozen=True)
class TrainedModel:
    """One rank's stage of a trained model, ready to run forward; `step` updates were made."""

    model: Transformer
    executor: PipelineExecutor
    step: int


def require_checkpoint(run: Path, step: int | None = None) -> Path:
    """Return the run's checkpoint of that step, or its newest one, without reading it; needs no process group.

    Raises CheckpointError where there is none.
    """
    found = {step_of(path): path for path in find_checkpoints(run / CHECKPOINTS)}
    if not found:
        raise _no_checkpoint(run)
    if step is not None and step not in found:
        known = ", ".join(map(str, sorted(found)[-9:]))
        raise CheckpointError(f"{run / CHECKPOINTS}: no checkpoint of step {step}; the newest are of {known}")
    return found[max(found) if step is None else step]


def load_checkpoint(run: Path, step: int | None, load: Load, group: Group = None) -> CheckpointReader:
    """Load the run's checkpoint of that step, or the newest one that is whole; see `latest_checkpoint`.

    Every rank of `group` must call. Raises CheckpointError where there is none, or that of `step` is damaged.
    """
    if step is None:
        reader = latest_checkpoint(run, load, group)
        if reader is None:
            raise _no_checkpoint(run)
        return reader
    with together(group):
        reader = CheckpointReader(require_checkpoint(run, step))
    load(reader)
    return reader


def _no_checkpoint(run: Path) -> CheckpointError:
    return CheckpointError(f"{run / CHECKPOINTS}: no checkpoint yet; train the run until it has saved one")


def load_trained(
    run: Path,
    config: RunConfig,
    vocab: int,
    mesh: ParallelMesh,
    document_start: int | None = None,
    averaged: bool = False,
    step: int | None = None,
) -> TrainedModel:
    """Return this rank's stage with the weights, or their average, of the run's checkpoint of `step` or the newest one.

    All ranks call. Raises CheckpointError where there is none, where it has no average, or is of another model.
    """
    model = build_stage(config, vocab, mesh, document_start=document_start).eval()

    def load(reader: CheckpointReader) -> None:
        with together(world_group()), closing(reader):
            read_weights(model, reader, averaged)

    reader = load_checkpoint(run, step, load, world_group())
    return TrainedModel(model, build_executor(config, model, mesh), reader.step)


@torch.no_grad()
def read_weights(model: Transformer, reader: CheckpointReader, averaged: bool = False) -> None:
    """Fill every parameter with its part of the checkpoint's weights, cast to the parameter's dtype.

    `averaged`: of their average, which frozen ones have none of.
    """
    with_average = set(reader.names("ema")) if averaged else set()
    if averaged and not with_average:
        raise CheckpointError(
            f"{reader.directory}: has no averaged weights; train with optim.ema_decay, or leave out --ema"
        )
    for parameter in (*model.parameters(), *kept_buffers(model)):
        spec = shard_of(parameter)
        parameter.copy_(reader.read_local(spec, "ema" if spec.name in with_average else "weight"))
