"""The names of a run's checkpoints and of what is in them, and which there are. No torch.

    RUN/checkpoints/step-00001000/{manifest.json, state.json, rank-00000-weight.safetensors, ...}

A checkpoint that is written, set aside or deleted has a hidden name meanwhile: `.step-00001000.partial`.
"""

from __future__ import annotations

import re
from pathlib import Path

from megalm.errors import CheckpointError

CHECKPOINTS = "checkpoints"
MANIFEST, STATE = "manifest.json", "state.json"
STATE_LIMIT_BYTES = 64 << 20
CHECKPOINT_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)
HIDDEN_NAME = re.compile(r"\.(step-(\d{8,18}))\.(partial|replaced|deleted)", re.ASCII)
FILE_NAME = re.compile(r"rank-(\d{5,9})-((?:weight|optimizer)(?:-\d+)?)\.safetensors", re.ASCII)


def checkpoint_name(step: int) -> str:
    """Return the name of the directory of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def file_name(rank: int, part: str) -> str:
    """Return the name of a rank's tensor file; `part` is "weight", "optimizer" or that with "-1", "-2", ..."""
    return f"rank-{rank:05d}-{part}.safetensors"


def parse_file_name(name: str) -> tuple[int, str]:
    """Return the rank and the part of a tensor file. Raises ValueError for another name."""
    match = FILE_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"file {name!r}")
    return int(match[1]), match[2]


def hidden(path: Path, role: str) -> Path:
    """Return the hidden neighbour of a checkpoint's directory: role "partial", "replaced" or "deleted"."""
    return path.with_name(f".{path.name}.{role}")


def find_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints below `directory`, newest first, valid or not; none where there is no directory.

    Where a replacement was interrupted, the checkpoint that it set aside stands for the step. Raises
    CheckpointError.
    """
    found: dict[int, Path] = {}
    try:
        for path in directory.iterdir() if directory.is_dir() else ():
            final, aside = CHECKPOINT_NAME.fullmatch(path.name), HIDDEN_NAME.fullmatch(path.name)
            if final and path.is_dir():
                found[int(final[1])] = path
            elif aside and aside[3] == "replaced" and not path.with_name(aside[1]).is_dir():
                found.setdefault(int(aside[2]), path)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{directory}: cannot read: {reason}; check the file system and permissions") from error
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """Return the step of a path that `find_checkpoints` gives."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name) or HIDDEN_NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1] if match.re is CHECKPOINT_NAME else match[2])
