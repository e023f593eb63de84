"""Which run a directory holds: what makes one, as `run.json` says, and what may be otherwise when it is gone on with.

Owns that file's format and the comparison of two recipes. Whose directory it is, is `run_directory`'s. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.config.optim import OptimRule
from megalm.config.run import RunConfig, section_types
from megalm.config.storage import masters_dtype, wide_dtype
from megalm.errors import ConfigError
from megalm.files import require_regular
from megalm.models.sources import fingerprint
from megalm.version import __version__

IDENTITY_FILE = "run.json"
FORMAT = "megalm-run-1"
SAVED, DOOMED, REMOVING = "saved", "doomed", "removing"
"""Of `run.json`: whether a checkpoint was ever saved, whether a start with `--fresh` is on its way, which is to remove
this run, and whether the run before this one is still being removed."""
_LARGEST_IDENTITY = 4 << 20

# What may differ from one start of a run to the next. First where and how it is computed; the data's path is free
# because its fingerprint is held instead, so prepared data may be moved, and so is that of first weights.
FREE_SECTIONS = frozenset(
    {
        *("run", "parallel", "zero", "overlap", "log", "checkpoint", "evaluate", "stability", "profile", "inspect"),
        "early_stop",
    }
)
FREE_KEYS = frozenset(
    {
        "train.stop_at",
        "train.micro_batch",
        "train.pad_batch",
        "train.recompute",
        "train.recompute_every",
        "train.offload_activations",
        "train.compile",
        "data.path",
        "train.init_from",
        "model.kernels",
        "model.flash_attention",
        "loss.fused_head",
    }
)
# Then what people change in a run's course. It changes what is computed from then on, so each start says what is
# another than in the checkpoint (`continuing.changes`). The optimizer's state and the order of samples stay as they
# are; the learning rate is one of the step's number, and batches are counted on from those that were.
COURSE_SECTIONS = frozenset({"lr_schedule", "batch_ramp"})
COURSE_KEYS = frozenset(
    {
        *("train.steps", "train.tokens", "train.epochs", "train.global_batch"),
        *("train.clip_grad_norm", "train.clip_grad_value"),
        *("optim.lr", "optim.adamw_lr", "optim.weight_decay"),
    }
)


def run_identity(
    config: RunConfig,
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    world: int,
    model_parameters: int,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what `run.json` holds of a run, which goes on with the one that `before` describes (None: a new one)."""
    return {
        "format": FORMAT,
        "megalm": __version__,
        SAVED: bool((before or {}).get(SAVED)),
        "world": world,
        "model_parameters": model_parameters,
        **identity_of(config, data_fingerprint, tokenizer_fingerprint, before),
    }


def identity_of(
    config: RunConfig, data_fingerprint: str, tokenizer_fingerprint: str, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the part of a run's identity that a resume is compared with."""
    return {
        "init_from": _first_weights(config, before),
        "data_fingerprint": data_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "data_path": config.data.path,
        "fixed": fixed_settings(config),
    }


def _first_weights(config: RunConfig, before: dict[str, Any] | None) -> dict[str, str] | None:
    """Return path and fingerprint of the weights that a run starts with.

    A run that was begun keeps those of its start: what has become of their source is nothing to a resume, so only
    another path is looked at.
    """
    path = config.train.init_from
    known: dict[str, str] | None = (before or {}).get("init_from")
    if path is None or (known is not None and known["path"] == path):
        return None if path is None else known
    return {"path": path, "fingerprint": fingerprint(Path(path))}


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return, by dotted key, the settings that make a run what it is and that may not change on a resume."""
    kept = _fixed(config.model_dump(mode="json"))
    masters = masters_dtype(config)
    return kept if masters == wide_dtype(config) else {**kept, "master weights": masters}


def _fixed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by dotted key, the fixed settings of a recipe given as JSON values."""
    return {key: value for key, value in by_dotted_key(recipe).items() if _is_fixed(key)}


def by_dotted_key(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe given as JSON values, of its sections "section.key"."""
    flat: dict[str, Any] = {}
    for name, section in recipe.items():
        if isinstance(section, Mapping):
            flat.update({f"{name}.{key}": value for key, value in section.items()})
        else:
            flat[name] = section
    return flat


def differing_settings(recipe: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return the fixed settings in which a checkpoint's recipe (JSON values) differs from `config`, with both values.

    A key that only one of them has is as if it had its default there; an empty recipe differs in nothing.
    """
    if not recipe:
        return []
    return _differences(_fixed(recipe), _fixed(config.model_dump(mode="json")), "in the checkpoint")


def _differences(before: dict[str, Any], now: dict[str, Any], place: str) -> list[str]:
    old, new = _with_defaults(before), _with_defaults(now)
    return [
        f"{key}={_show(old.get(key))} {place}, {_show(new.get(key))} here"
        for key in sorted({*old, *new})
        if _is_fixed(key) and old.get(key) != new.get(key)
    ]


def _is_fixed(key: str) -> bool:
    return key.partition(".")[0] not in FREE_SECTIONS | COURSE_SECTIONS and key not in FREE_KEYS | COURSE_KEYS


def read_identity(path: Path) -> dict[str, Any] | None:
    """Return a run directory's `run.json`, None where there is none. Raises ConfigError for a foreign one."""
    try:
        require_regular(path / IDENTITY_FILE)
        with (path / IDENTITY_FILE).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_IDENTITY + 1)
        if len(text) > _LARGEST_IDENTITY:
            raise ValueError(f"longer than {_LARGEST_IDENTITY} characters")
        identity = json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path / IDENTITY_FILE}: cannot be read ({reason}); choose another run.dir") from error
    parts = {"data_fingerprint": str, "tokenizer_fingerprint": str, "data_path": str, "fixed": dict}
    whole = isinstance(identity, dict) and all(isinstance(identity.get(name), kind) for name, kind in parts.items())
    if not whole or identity.get("format") != FORMAT:
        raise ConfigError(f"{path / IDENTITY_FILE}: not the identity of a run of this version; choose another run.dir")
    return identity


def refuse_other_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError when the identities differ, naming each setting with both values.

    A key that the run was started without, as it came later, had what is its default now; one that may change by now
    does not count.
    """
    differences = _differences(before["fixed"], now["fixed"], "there")
    for name, label in (("data_fingerprint", "data"), ("tokenizer_fingerprint", "tokenizer")):
        if before[name] != now[name]:
            differences.append(
                f"{label} fingerprint {before[name][:12]} there ({before['data_path']}), "
                f"{now[name][:12]} here ({now['data_path']})"
            )
    weights = [(each.get("init_from") or {}).get("fingerprint", "none") for each in (before, now)]
    if weights[0] != weights[1]:
        differences.append(f"first weights (train.init_from) {weights[0][:12]} there, {weights[1][:12]} here")
    if differences:
        raise ConfigError(
            f"run.dir={path} holds another run: {'; '.join(differences)}; choose another run.dir, "
            "or --fresh to remove that run"
        )


def _with_defaults(fixed: dict[str, Any]) -> dict[str, Any]:
    whole = {**defaults(), **fixed}
    fields = OptimRule.model_fields.items()
    own = {key: field.get_default() for key, field in fields if not field.is_required()}
    return {**whole, "optim.rules": [{**own, **rule} for rule in whole["optim.rules"]]}


def defaults() -> dict[str, Any]:
    """Return the default of every key of a section that has one, as JSON has it."""
    found = {
        f"{section}.{key}": field.get_default()
        for section, kind in section_types().items()
        for key, field in kind.model_fields.items()
        if not field.is_required() and _is_fixed(f"{section}.{key}")
    }
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values


def _show(value: object) -> str:
    return json.dumps(value)
