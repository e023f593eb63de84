"""`config.json` into the recipe's model section and back, for each family.

Owns the words of transformers for what a model is. A `Family` is data: which of its keys is which of ours, what is
always so, and which values of its keys we cannot compute. What both directions share beyond single keys (rotary
positions, windows, activations, experts) stands here once. Every value read is checked: the file may be anyone's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megalm.config.model import ModelSection
from megalm.errors import ConfigError
from megalm.models.huggingface.mapping import Row

LARGEST = 2**31 - 1
LONGEST = 2**24  # tokens of a row, whose tables of angles are computed
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu"}
_PLAIN = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
_TURNS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


class Fields:
    """The values of a `config.json`, each checked when it is read. Methods raise ConfigError naming file and key."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values = {**(defaults or {}), **values}
        self.where = where

    def wrong(self, key: str, reason: str) -> ConfigError:
        """Return the error for a value."""
        return ConfigError(f"{self.where}: {key}={repr(self.values.get(key))[:60]} {reason}")

    def count(self, key: str, least: int = 1, most: int = LARGEST) -> int:
        """Return a whole number."""
        value = self.values.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"is no whole number from {least} to {most}")
        return value

    def number(self, key: str, least: float = 0.0, most: float = 1e12) -> float:
        """Return a finite number."""
        value = self.values.get(key)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.wrong(key, f"is no number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "is neither true nor false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], what: str) -> str:
        """Return what a text stands for."""
        value = self.values.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"is a {what} that megalm lacks; it has {', '.join(choices)}")
        return choices[value]

    def section(self, key: str) -> dict[str, Any]:
        """Return an object, empty where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "is no object")
        return value or {}

    def has(self, key: str) -> bool:
        """Return whether there is a value that is not null."""
        return self.values.get(key) is not None


@dataclass(frozen=True)
class Family:
    """What transformers calls one architecture, and what megalm makes of it."""

    name: str
    model_type: str
    architecture: str
    prefix: str
    """What stands before the names of all tensors but the head's; files of a bare model have it left out."""
    rows: tuple[Row, ...]
    keys: Mapping[str, str]
    """Of ours to theirs, where both have the same value: counts, numbers and flags."""
    fixed: Mapping[str, Any]
    """Keys of ours that every model of the family has so."""
    defaults: Mapping[str, Any]
    """What transformers takes where a config.json says nothing."""
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Keys of theirs of which we compute one value alone, and what another would be."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other words for keys of theirs, by other versions."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that older files hold and that are no weights."""
    activation: str = "hidden_act"
    gated: bool = True
    theta: float = 10000.0
    share: float | None = None
    """How much of a head turns where nothing is said; None: all of it, always."""
    windows: str = "none"
    """Which layers a window is in: none, all, or all if it is "switched" on; where layer_types says nothing those from
    max_window_layers on ("above"), or every other one, the first included ("alternating")."""

    def section(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the keys of the recipe's model section of a `config.json`. Raises ConfigError."""
        renamed = {self.aliases[key]: value for key, value in values.items() if key in self.aliases}
        fields = Fields({**renamed, **values}, where, self.defaults)
        for key, (value, what) in self.only.items():
            if fields.values.get(key) not in (value, None):
                raise fields.wrong(key, f"is {what}, which megalm has not")
        found: dict[str, Any] = {}
        for ours, theirs in self.keys.items():
            if fields.has(theirs) or ours in _REQUIRED:
                found[ours] = _read(fields, ours, theirs)
        found["activation"] = fields.choice(self.activation, _GATED if self.gated else _PLAIN, "activation")
        if self.fixed.get("position") == "rotary":
            found |= _rotary(fields, self, found)
        found |= _windows(fields, self.windows, found.get("layers", 0))
        if "experts" in found:
            found |= _dense_layers(fields, found)
            if found.get("experts_per_token") == 1:
                raise fields.wrong(
                    "num_experts_per_tok", "has gates divided by their sum, which megalm's one gate is not"
                )
        if self.model_type == "gemma2" and "hidden" in found:
            found["embedding_scale"] = math.sqrt(found["hidden"])
        whole = {**self.fixed, **found}
        try:
            ModelSection.model_validate(whole)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            shown = self.keys.get(key, key)
            raise ConfigError(f"{where}: {shown}: {str(first['msg'])[:120]} (model.{key})") from error
        return whole

    def config(self, model: ModelSection, vocab: int) -> dict[str, Any]:
        """Return the `config.json` nearest to a model; `section` of it tells whether it is the same model."""
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        whole = {**model.model_dump(mode="json"), **_said(model), "vocab": vocab}
        values |= {theirs: whole[ours] for ours, theirs in self.keys.items()}
        values |= {key: value for key, (value, _) in self.only.items() if value is not None}
        names = _GATED if self.gated else _PLAIN
        values[self.activation] = next((name for name, ours in names.items() if ours == model.activation), "unknown")
        if self.fixed.get("position") == "rotary":
            values |= _rotary_config(model, self)
        values |= _window_config(model, self.windows)
        if "mlp_only_layers" in self.defaults:
            values |= {"mlp_only_layers": list(range(model.dense_layers))}
        return {**values, "initializer_range": model.init_std}


def _said(model: ModelSection) -> dict[str, Any]:
    """Return, by our key, what a model has where the recipe leaves it to be derived."""
    return {
        "kv_heads": model.key_value_heads,
        "head_dim": model.head_size,
        "ffn": model.feed_forward,
        "expert_ffn": model.expert_features,
        "qkv_bias": model.has_qkv_bias,
        "out_bias": model.has_out_bias,
        "attention_dropout": model.probability_dropout,
        "scores_head_dim": model.head_size if model.scores_head_dim is None else model.scores_head_dim,
    }


_REQUIRED = ("vocab", "layers", "hidden", "heads", "sequence")
_FLAGS = ("tie_embeddings", "parallel_residual", "bias", "qkv_bias", "out_bias")
_NUMBERS = ("norm_eps", "attention_softcap", "logit_softcap", "dropout", "attention_dropout")


def _read(fields: Fields, ours: str, theirs: str) -> Any:
    if ours in _FLAGS:
        return fields.flag(theirs)
    if ours in _NUMBERS:
        return fields.number(theirs)
    if ours in ("sequence", "layers"):
        return fields.count(theirs, most=LONGEST)
    return fields.count(theirs)


def _rotary(fields: Fields, family: Family, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return our keys of rotary positions, from either form: rope_parameters, or rope_theta and rope_scaling."""
    old = "rope_scaling" if fields.section("rope_scaling") else "rope_parameters"
    rope = Fields(fields.section(old), f"{fields.where}: {old}", {"rope_type": "default"})
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise fields.wrong(old, "has rotary positions by kinds of layers, which megalm has not")
    for key, names in (("rope_theta", ("rope_theta", "rotary_emb_base")), ("partial_rotary_factor", ("rotary_pct",))):
        for name in (*names, key):
            if key not in rope.values and fields.has(name):
                rope.values[key] = fields.values[name]
    rope.values.setdefault("rope_theta", family.theta)
    rope.values.setdefault("partial_rotary_factor", 1.0 if family.share is None else family.share)
    if family.share is None and rope.values["partial_rotary_factor"] != 1.0:
        raise rope.wrong("partial_rotary_factor", f"is not 1, the one that {family.name} has")
    head = shape.get("head_dim") or shape["hidden"] // shape["heads"]
    turning = int(head * rope.number("partial_rotary_factor", 1e-9, 1.0))
    if turning % 2 or turning == 0:  # transformers then has angles for one feature more
        raise rope.wrong("partial_rotary_factor", f"turns {turning} of a head's {head} features, which are no pairs")
    kind = rope.values["rope_type"] if "rope_type" in fields.section(old) else rope.values.get("type", "default")
    found = {
        "rotary_base": rope.number("rope_theta", 1.0 + 1e-9, 1e15),
        "rotary_share": rope.number("partial_rotary_factor", 1e-9, 1.0),
    }
    if kind == "default":
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.wrong("rope_type", "is a scaling that megalm lacks; it has default, linear, llama3, yarn")
    found |= {"rotary_scaling": kind, "rotary_factor": rope.number("factor", 1.0, 1e6)}
    if kind != "linear":
        rope.values.setdefault("original_max_position_embeddings", fields.values.get("max_position_embeddings"))
        found["rotary_original"] = rope.count("original_max_position_embeddings")
    fixed = {"llama3": _TURNS, "yarn": _YARN}.get(str(kind), {})
    if kind == "yarn":
        growth = 0.1 * math.log(found["rotary_factor"]) + 1.0
        if rope.has("attention_factor") and not math.isclose(rope.number("attention_factor"), growth, rel_tol=1e-6):
            raise rope.wrong("attention_factor", f"is not yarn's {growth:.6g}, the one that megalm has")
        if rope.has("mscale") or rope.has("mscale_all_dim"):
            raise rope.wrong("mscale", "is a growth that megalm lacks")
    for key, value in fixed.items():
        if rope.has(key) and rope.values[key] != value:
            raise rope.wrong(key, f"is not {value}, the one that megalm has")
    return found


def _rotary_config(model: ModelSection, family: Family) -> dict[str, Any]:
    """Return the keys that every version of transformers reads."""
    partial = family.share is not None
    values: dict[str, Any] = {"rotary_emb_base" if partial else "rope_theta": model.rotary_base}
    if partial:
        values["rotary_pct"] = model.rotary_share
    kind = model.rotary_scaling
    if kind in ("linear", "llama3", "yarn"):
        scaling: dict[str, Any] = {"rope_type": kind, "factor": model.rotary_factor}
        if kind != "linear":
            scaling["original_max_position_embeddings"] = model.rotary_original
        values["rope_scaling"] = scaling | (_TURNS if kind == "llama3" else {})
        if partial:  # these take both from the one object
            scaling |= {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_share}
    return values


def _windows(fields: Fields, where: str, layers: int) -> dict[str, Any]:
    """Return our window and the letters of its layers."""
    off = fields.values.get("use_sliding_window", True) is False
    if where == "none" or not fields.has("sliding_window") or off:
        return {}
    letters = "S"
    if where in ("above", "alternating"):
        types = fields.values.get("layer_types")
        if types is None:
            first = fields.count("max_window_layers", 0) if where == "above" else 0
            types = [n >= first if where == "above" else n % 2 == 0 for n in range(layers)]
            types = ["sliding_attention" if slides else "full_attention" for slides in types]
        known = {"sliding_attention": "S", "full_attention": "L"}
        if not isinstance(types, list) or len(types) != layers or not all(str(kind) in known for kind in types):
            raise fields.wrong("layer_types", f"is no list of sliding_attention and full_attention for {layers} layers")
        letters = "".join(known[str(kind)] for kind in types)
    if "S" not in letters:
        return {}
    return {"window": fields.count("sliding_window"), "window_pattern": shortest(letters)}


def shortest(letters: str) -> str:
    """Return the shortest pattern whose repetition begins with these letters."""
    sizes = range(1, len(letters) + 1)
    return next(letters[:n] for n in sizes if (letters[:n] * len(letters))[: len(letters)] == letters)


def _window_config(model: ModelSection, where: str) -> dict[str, Any]:
    if where == "none":
        return {}
    slides = [model.window_of(layer) is not None for layer in range(model.layers)]
    values: dict[str, Any] = {"sliding_window": model.window if any(slides) else None}
    if where in ("above", "alternating"):
        values["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    if where in ("above", "switched"):
        values["use_sliding_window"] = any(slides)
    if where == "above":
        values["max_window_layers"] = slides.index(True) if any(slides) else model.layers
    return values


def _dense_layers(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many layers in front have no experts, of those families that may have such layers."""
    layers = fields.values.get("mlp_only_layers") or []
    if not isinstance(layers, list) or len(layers) >= found["layers"] or layers != list(range(len(layers))):
        raise fields.wrong("mlp_only_layers", "are not the first layers, the only ones that megalm has without experts")
    return {"dense_layers": len(layers)} if layers else {"ffn": None}


def meaning(model: ModelSection) -> dict[str, Any]:
    """Return what a model computes, by our keys: what is derived is written out, what has no effect is left out."""
    values = {**model.model_dump(mode="json"), **_said(model)}
    values["window"] = [model.window_of(layer) for layer in range(model.layers)]
    values["dense_layers"] = [layer for layer in range(model.layers) if not model.has_experts(layer)]
    rotary = model.position == "rotary"
    values["rotary_share"] = model.rotary_size if rotary else None
    idle = {
        *("window_pattern", "kernels", "flash_attention", "init", "init_std", "init_depth_scaled", "document_mask"),
        *("dropout", "attention_dropout", "stochastic_depth", "capacity_factor"),  # of training alone
        *(() if rotary else ("rotary_base", "rotary_scaling")),
        *(() if rotary and model.rotary_scaling != "none" else ("rotary_factor", "rotary_original")),
        *(() if model.position == "t5" else ("relative_buckets", "relative_distance")),
        *(() if model.attention_pattern != "full" else ("block_size", "local_blocks", "block_stride", "global_tokens")),
        *(() if model.has_dense_mlps else ("ffn",)),
        *("expert_ffn", "experts_per_token", "router_score", "shared_experts"),
    }
    if model.experts is not None:
        idle -= {"expert_ffn", "experts_per_token", "router_score", "shared_experts", "capacity_factor"}
        if model.norm != "layernorm" and not values["dense_layers"] and not model.shared_experts:
            idle.add("bias")  # experts have none
    if model.width_factor == 1.0 and model.query_factor == 1.0:
        idle |= {"mup_base", "mup_base_head_dim"}
    if rotary:
        idle.add("sequence")  # how long the tables are
    return {key: value for key, value in values.items() if key not in idle}


def differences(model: ModelSection, other: Mapping[str, Any]) -> list[str]:
    """Return what the model section `other` computes otherwise than `model`, as `key=value` of the first."""
    mine, theirs = meaning(model), meaning(ModelSection.model_validate(other))
    return [f"model.{key}={_short(model, key)}" for key in mine if mine[key] != theirs.get(key)]


def _short(model: ModelSection, key: str) -> str:
    value = getattr(model, key)
    return str(value).lower() if isinstance(value, bool) else str(value)
