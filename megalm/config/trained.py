"""The recipe of a trained model, for a layout of its own: evaluation and generation start from it.

Owns which keys may be set anew once a model is trained. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.config.load import load_resolved
from megalm.config.run import ProfileSection, RunConfig, key_fields
from megalm.errors import ConfigError

# One process that runs forward, whatever trained the model. These come before the user's overrides.
ONE_PROCESS = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.context=1",
    "parallel.context_attention=ring",
    "parallel.expert=1",
    "parallel.sequence=false",
    "parallel.schedule=1f1b",
    "parallel.virtual_stages=1",
    "parallel.partition=null",
    "zero.stage=0",
    "zero.config=null",
    "overlap.gradients=false",
    "overlap.tensor_chunks=1",
    "overlap.messages=true",
    "train.pad_batch=true",  # no batch is made, which the ranks would have to divide
    "train.offload_activations=false",  # of training alone, and evaluation may be on a CPU
    "train.compile=false",  # of training alone, and it excludes schedules
    "train.fp8=none",  # "
    "checkpoint.keep_best=null",  # no checkpoint is made, and evaluation is what the user asks for
)
FOR_GENERATION = (
    "parallel.sequence=false",
    "parallel.context=1",
    "parallel.context_attention=ring",
    "parallel.expert=1",
)
"""Behind a user's overrides: windows have any length, which no axis need divide."""
_FREE_SECTIONS = frozenset({"parallel", "overlap", "evaluate"})
_FREE_KEYS = frozenset(
    {
        "precision",
        "model.kernels",
        "model.flash_attention",
        "train.micro_batch",
        "data.path",
        "run.device",
        "run.start_timeout_s",
        "run.collective_timeout_s",
    }
)


def trained_config(run: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the recipe of the run in directory `run`, laid out on one process unless `overrides` say else.

    Raises ConfigError where there is no run, and for an override of what the training has fixed.
    """
    if run.is_file():
        raise ConfigError(f"{run}: is a file, not a run; give the run.dir of a run")
    known = key_fields()
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in known and key.partition(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS:
            raise ConfigError(
                f"{override} cannot be set for a trained model; what may change of its recipe is parallel.*, "
                f"overlap.*, evaluate.*, {', '.join(sorted(_FREE_KEYS))}"
            )
    config = load_resolved(run, (*ONE_PROCESS, *overrides))
    return config.model_copy(update={"profile": ProfileSection()})  # whose ranks may not be there
