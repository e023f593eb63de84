"""Where a new run's first weights come from: a run, one checkpoint, or a Hugging Face directory. No torch.

Owns which of the three a path is, and the fingerprint by which a run remembers its source.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megalm.checkpoint.names import CHECKPOINTS, MANIFEST, find_checkpoints
from megalm.errors import CheckpointError
from megalm.files import require_regular

CONFIG = "config.json"
COMPANIONS = "companions"  # of a run: what stands beside the weights of a model of transformers
_LONGEST_HEADER = 100_000_000


def is_huggingface(path: Path) -> bool:
    """Return whether a path is a Hugging Face directory: it has a config.json and is no checkpoint."""
    return (path / CONFIG).is_file() and not (path / MANIFEST).exists()


def newest_checkpoint(path: Path) -> Path:
    """Return a checkpoint's directory: `path` itself, or the newest of a run. Raises CheckpointError."""
    if (path / MANIFEST).is_file():
        return path
    found = find_checkpoints(path / CHECKPOINTS)
    if not found:
        raise CheckpointError(
            f"{path}: no run with a checkpoint, no checkpoint and no Hugging Face directory; give one of the three"
        )
    return found[0]


def fingerprint(path: Path) -> str:
    """Return what identifies the weights at a path, in hexadecimal. Raises CheckpointError.

    Of a checkpoint it is the SHA-256 of the manifest, which has that of every file; of a Hugging Face directory that of
    the config, the index, and the name, size and header of every safetensors file: of gigabytes of weights only their
    places, so that a start need not read them all.
    """
    try:
        if not is_huggingface(path):
            return hashlib.sha256(_whole(newest_checkpoint(path) / MANIFEST)).hexdigest()
        digest = hashlib.sha256(_whole(path / CONFIG))
        for file in sorted(path.glob("*.safetensors")):
            require_regular(file)
            with open(file, "rb") as stream:
                length = stream.read(8)
                header = stream.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
            digest.update(f"\n{file.name} {file.stat().st_size}\n".encode() + length + header)
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot read: {error.strerror or error}") from error


def _whole(path: Path) -> bytes:
    require_regular(path)
    return path.read_bytes()
