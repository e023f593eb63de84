"""`megalm import-hf`: a Hugging Face directory becomes a run's directory.

Weights keep the dtype that they have in the files, so nothing is lost whatever the recipe's precision is. They go from
file to checkpoint one by one.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from megalm.data.tokenizer import FILE_NAME, Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.models.build import DTYPES
from megalm.models.huggingface.companions import read_companions
from megalm.models.huggingface.reader import CONFIG, HuggingFaceReader
from megalm.models.imported import require_free, write_run
from megalm.models.sources import COMPANIONS, fingerprint


def import_model(directory: Path, out: Path, precision: str | None = None) -> dict[str, Any]:
    """Write the run's directory `out` from a directory of config.json, safetensors and perhaps what else a model has.

    `precision` is the recipe's (None: the one that most weights are stored in). Keys of the result: run, family,
    parameters, tensors, stored, precision, tokenizer. Raises ConfigError, CheckpointError or DataError.
    """
    require_free(out)
    reader = HuggingFaceReader(directory)
    reader.check_tied()
    tokenizer = _tokenizer(directory, reader.model.vocab or 0)
    elements: Counter[str] = Counter()
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, shape in reader.shapes().items():
        elements[names[reader.dtype(name)]] += prod(shape)
    precision = precision or elements.most_common(1)[0][0]
    source = {
        "format": "huggingface",
        "family": reader.family.name,
        "model_type": reader.family.model_type,
        "path": str(directory),
        "fingerprint": fingerprint(directory),
    }
    companions = read_companions(directory, reader.config, str(directory / CONFIG))
    beside = {f"{COMPANIONS}/{name}": content for name, content in companions.items()}
    write_run(out, reader.section, reader.tensors(), tokenizer, source, precision=precision, beside=beside)
    return {
        "run": str(out),
        "family": reader.family.name,
        "parameters": elements.total(),
        "tensors": len(reader.bound),
        "stored": ", ".join(sorted(elements)),
        "precision": precision,
        "tokenizer": "none" if tokenizer is None else FILE_NAME,
    }


def _tokenizer(directory: Path, vocab: int) -> Path | None:
    """Return the place of the directory's tokenizer, if it has one. Raises where megalm could not use it."""
    path = directory / FILE_NAME
    if path.is_symlink():
        raise DataError(f"{path}: a symbolic link, which is not followed; copy the file itself")
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.load(path)
    except DataError as error:
        raise DataError(f"{error}; or take {FILE_NAME} out of {directory}, to import the weights alone") from error
    if tokenizer.vocabulary > vocab:
        raise ConfigError(
            f"{path}: {tokenizer.vocabulary} tokens, and the model has {vocab} (vocab_size); they are not of one model"
        )
    return path
