"""Which program a directory's checkpoint is of, and its model."""

from __future__ import annotations

from pathlib import Path

from megalm.errors import CheckpointError
from megalm.models.foreign.deepspeed_universal import read_universal, universal_directory
from megalm.models.foreign.imported_model import ForeignModel
from megalm.models.foreign.megatron import iteration_directory, read_megatron
from megalm.models.foreign.megatron_distributed import INDEX, read_distributed


def read_foreign_megatron(directory: Path, vocab: int | None = None) -> ForeignModel:
    """Return the model of Megatron-LM's newest checkpoint in a directory, of either format.

    `vocab` leaves out rows of the vocabulary beyond, which pad it. Raises CheckpointError.
    """
    found = directory if (directory / INDEX).exists() else iteration_directory(directory)
    if found is None:
        raise CheckpointError(
            f"{directory}: is no checkpoint of Megatron-LM: neither latest_checkpointed_iteration.txt nor mp_rank_00 "
            "nor .metadata is there; name the directory of --save, or one iter_... in it"
        )
    return read_distributed(found, vocab) if (found / INDEX).exists() else read_megatron(found, vocab)


def read_foreign_deepspeed(directory: Path, vocab: int | None = None) -> ForeignModel:
    """Return the model of DeepSpeed's newest universal checkpoint in a directory. Raises CheckpointError."""
    found = universal_directory(directory)
    if found is None:
        raise CheckpointError(
            f"{directory}: is no universal checkpoint: neither latest_universal nor zero/ is there; make one with "
            "python -m deepspeed.checkpoint.ds_to_universal"
        )
    return read_universal(found, vocab)
