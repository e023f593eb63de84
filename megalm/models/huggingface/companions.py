"""What stands beside a model's weights for transformers: special tokens, the chat template, how to generate.

megalm computes with none of it. An import keeps it in the run's directory `companions`, the files as they are, so does
a run that begins with such weights, and an export writes it back. Of a run without it megalm knows one special token,
the end of a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.data.tokenizer import FILE_NAME, Tokenizer, read_tokenizer_file
from megalm.errors import CheckpointError, ConfigError
from megalm.models.huggingface.fields import LARGEST
from megalm.models.huggingface.safetensors_files import parse_object, read_bounded, read_json
from megalm.models.sources import COMPANIONS, CONFIG, is_huggingface, newest_checkpoint

FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
TOKEN_IDS = "token_ids.json"
"""In the run's directory, of the model's config.json."""
LIMIT_BYTES = 16 << 20
_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_IDS = 1000


def read_companions(directory: Path, config: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """Return the files to be kept of a model's directory, by name; `config` is its config.json, named `where`.

    Raises CheckpointError for files that are links, larger than 16 MiB, or neither JSON objects nor texts in UTF-8,
    ConfigError for ids that are none.
    """
    ids = {key: config[key] for key in _KEYS if key in config}
    for key, value in ids.items():
        several = value if isinstance(value, list) else [value]
        if value is not None and not (len(several) <= _MOST_IDS and all(map(_is_id, several))):
            raise ConfigError(f"{where}: {key}={repr(value)[:60]} is neither a token's number nor a list of them")
    return {TOKEN_IDS: _json(ids), **_files(directory)}


def companions_of(source: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return what a run that begins with the weights of a source keeps, by name.

    `source` is a Hugging Face directory, a run, or a checkpoint of one. Where it has another tokenizer than that given,
    or none, its special tokens are not this run's: {}. Raises as `read_companions` does.
    """
    path = source / CONFIG
    place = source if is_huggingface(source) else newest_checkpoint(source).resolve().parent.parent
    if not (place / FILE_NAME).is_file() or read_tokenizer_file(place / FILE_NAME) != tokenizer.serialized:
        return {}
    if is_huggingface(source):
        return read_companions(source, read_json(path), str(path))
    return kept_companions(place)


def kept_companions(run: Path) -> dict[str, bytes]:
    """Return what a run keeps, by name; {} where it keeps nothing. Raises CheckpointError."""
    kept = run / COMPANIONS
    return {TOKEN_IDS: read_bounded(kept / TOKEN_IDS, LIMIT_BYTES), **_files(kept)} if kept.is_dir() else {}


def _is_id(value: Any) -> bool:
    return type(value) is int and -1 <= value <= LARGEST  # some say -1 for none


def _files(directory: Path) -> dict[str, bytes]:
    found = {}
    for name in FILES:
        path = directory / name
        if not path.is_symlink() and not path.exists():
            continue
        found[name] = read_bounded(path, LIMIT_BYTES)
        if name.endswith(".json"):
            parse_object(found[name], path)
        try:
            found[name].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: no text in UTF-8 ({error}); take the file anew, or away") from error
    return found


def written_companions(
    run: Path, tokenizer: Tokenizer | None, longest: int
) -> tuple[dict[str, int | list[int] | None], dict[str, bytes]]:
    """Return the special tokens' ids for a config.json, and the files beside it, by name.

    They are those that came with an imported run. Of another the one id that is known is that of the end of a text; for
    what is not known null is written, as transformers would else take the ids of some published model.
    """
    if files := kept_companions(run):
        return parse_object(files.pop(TOKEN_IDS), run / COMPANIONS / TOKEN_IDS), files
    end = None if tokenizer is None else tokenizer.end_of_text
    ids: dict[str, int | list[int] | None] = {**dict.fromkeys(_KEYS), "eos_token_id": end}
    files = {"generation_config.json": _json({"_from_model_config": True, **ids})}
    if tokenizer is not None:
        special = {"eos_token": tokenizer.end_token}
        about = {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
        }
        files |= {"tokenizer_config.json": _json(about), "special_tokens_map.json": _json(special)}
    return ids, files


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
