"""What a resumed run takes from its checkpoint, and what its recipe says otherwise than before.

Samples are used in one order, whatever batches they come in, and progress counts them: so batches may change from one
start to the next. A length in tokens, which is made steps by the size of batches, is counted on from those that were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from megalm.checkpoint.names import STATE
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.ramps import samples_before, steps_for
from megalm.config.run import RunConfig, key_fields
from megalm.errors import CheckpointError, ConfigError
from megalm.train.run_identity import by_dotted_key
from megalm.train.trainer import TrainState
from megalm.zero.engine import ZeroEngine

_UNTOLD = frozenset({"run.dir"})


def progress_of(reader: CheckpointReader) -> TrainState:
    """Return the progress that a checkpoint's state holds.

    Raises CheckpointError where there is none, and for that of a newer program.
    """
    path, progress = reader.directory / STATE, reader.state.get("progress")
    known = {field.name for field in fields(TrainState)}
    if not isinstance(progress, dict) or "samples" not in progress:
        raise CheckpointError(
            f"{path}: holds no progress of a run; delete this checkpoint to resume from an older one, or restore it "
            "from a copy"
        )
    unknown = sorted({*progress} - known)
    if unknown:
        raise CheckpointError(f"{path}: its progress has {', '.join(unknown)}, of a newer megalm; use that one")
    return TrainState(**{"planned": progress["samples"], **progress})


def load_all(engine: ZeroEngine, reader: CheckpointReader) -> None:
    """Set weights and optimizer from a checkpoint of the same run. Every rank of the world must call.

    Raises CheckpointError on all ranks; what the engine holds is then undefined, until another load.
    """
    with closing(reader):
        kinds = [kind for kind in reader.kinds() if kind != "weight"]
        engine.load(reader.read_flat, kinds, progress_of(reader).updates)
    engine.module.further_sums.zero_()  # type: ignore[operator]


def continued(config: RunConfig, done: TrainState, checkpoint: Path) -> RunConfig:
    """Return the recipe with the length, if given in tokens, in steps: those that are done, and those that are left.

    Where batches are as they always were that is the same number of steps. Raises ConfigError for a length that is
    behind the run already.
    """
    if config.train.tokens is not None:
        whole = -(-config.train.tokens // config.model.sequence)
        left = whole - done.planned
        steps = done.step if left <= 0 else steps_for(config, left + samples_before(config, done.step))
        if steps != config.steps:
            train = {**config.train.model_dump(), "tokens": None, "steps": steps}
            config = RunConfig.model_validate({**config.model_dump(), "train": train})
    if config.steps < done.step:
        raise ConfigError(
            f"train.steps={config.steps} is less than the {done.step} steps that {checkpoint} has; use at least "
            f"{done.step}, or choose another run.dir"
        )
    return config


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what a recipe (JSON, by sections) says otherwise than an earlier one, by dotted key: "1 -> 2".

    A key that the earlier one lacks, as it came later, had its default.
    """
    defaults = {key: field.get_default() for key, field in key_fields().items() if not field.is_required()}
    old, new = (by_dotted_key(recipe) for recipe in (before, now))
    found = {}
    for key in sorted(new.keys() - _UNTOLD):
        was, is_now = (json.dumps(value) for value in (old.get(key, defaults.get(key)), new[key]))
        if was != is_now:
            found[key] = f"{was} -> {is_now}"
    return found
