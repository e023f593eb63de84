"""`config.json` into the recipe's model section and back, for each family.

Owns the words of transformers for what a model is. A `Family` is data: which of its keys is which of ours, what is
always so, and which values of its keys we cannot compute. What both directions share beyond single keys (windows,
activations, experts) stands here once, rotary positions in `rotary`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megalm.config.fields import LARGEST_ENUMERATED
from megalm.config.model import ModelSection
from megalm.errors import ConfigError
from megalm.models.huggingface.fields import Fields
from megalm.models.huggingface.mapping import Row
from megalm.models.huggingface.rotary import read_rotary, write_rotary

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
    alike: Mapping[str, str] = field(default_factory=dict)
    """Keys of theirs that must have the value of another, where one of ours stands for both."""
    even: bool = False
    """Whether transformers refuses a width that heads do not divide, whatever the size of a head is."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that older files hold and that are no weights."""
    activation: str = "hidden_act"
    gated: bool = True
    theta: float = 10000.0
    share: float | None = None
    """How much of a head turns where nothing is said; None: all of it, always."""
    windows: str = "none"
    """Which layers a window is in: none, all, all whatever layer_types says too ("uniform"), or all if it is "switched"
    on; where layer_types says nothing those from max_window_layers on ("above", if it is switched on), or every other
    one, the first included ("alternating")."""

    def section(self, values: Mapping[str, Any], where: str, tensors: int = LARGEST_ENUMERATED) -> dict[str, Any]:
        """Return the keys of the recipe's model section of a `config.json`. Raises ConfigError, naming file and key.

        There are not to be more layers or experts than `tensors`, before anything is made of so many.
        """
        renamed = {self.aliases[key]: value for key, value in values.items() if key in self.aliases}
        fields = Fields({**renamed, **values}, where, self.defaults)
        for key, (value, what) in self.only.items():
            if fields.values.get(key) not in (value, None):
                raise fields.wrong(key, f"is {what}, which megalm has not")
        for key, other in self.alike.items():
            if fields.values.get(key) != fields.values.get(other):
                said = f"is not {other}={repr(fields.values.get(other))[:40]}, and megalm has one value for both"
                raise fields.wrong(key, f"{said}; make them alike there")
        found: dict[str, Any] = {}
        for ours, theirs in self.keys.items():
            if fields.has(theirs) or ours in _REQUIRED:
                found[ours] = _read(fields, ours, theirs)
                if ours in ("layers", "experts") and found[ours] > tensors:
                    raise fields.wrong(theirs, f"is more {ours} than there are tensors, {tensors}")
        if self.even and found["hidden"] % found["heads"]:
            raise fields.wrong(self.keys["hidden"], f"is no multiple of {self.keys['heads']}, as {self.name} has it")
        found["activation"] = fields.choice(self.activation, _GATED if self.gated else _PLAIN, "an activation")
        if self.fixed.get("position") == "rotary":
            head = found.get("head_dim") or found["hidden"] // found["heads"]
            found |= read_rotary(fields, self.name, self.theta, self.share, head)
        found |= _windows(fields, self.windows, found["layers"])
        if "experts" in found:
            found |= _dense_layers(fields, found)
            if found.get("experts_per_token") == 1:
                raise fields.wrong(
                    "num_experts_per_tok", "has gates divided by their sum, which megalm's one gate is not"
                )
        if self.model_type == "gemma2":
            found["embedding_scale"] = math.sqrt(found["hidden"])
        whole = {**self.fixed, **found}
        try:
            ModelSection.model_validate(whole)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"model.{'.'.join(map(str, first['loc']))}: {str(first['msg'])[:120]}"
            raise ConfigError(f"{where}: {self.in_their_words(reason)}") from error
        return whole

    def in_their_words(self, reason: str) -> str:
        """Return a reason with their key before each key of ours that has one."""
        return re.sub(
            r"model\.(\w+)", lambda found: f"{self.keys[found[1]]} ({found[0]})" if found[1] in self.keys else found[0],
            reason,
        )  # fmt: skip

    def config(self, model: ModelSection, vocab: int) -> dict[str, Any]:
        """Return the `config.json` nearest to a model; `section` of it tells whether it is the same model."""
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        whole = {**model.model_dump(mode="json"), **_said(model), "vocab": vocab}
        values |= {theirs: whole[ours] for ours, theirs in self.keys.items()}
        values |= {key: values[other] for key, other in self.alike.items()}
        values |= {key: value for key, (value, _) in self.only.items() if value is not None}
        names = _GATED if self.gated else _PLAIN
        # One that the family lacks comes back as another, and so is found out.
        values[self.activation] = next((name for name, ours in names.items() if ours == model.activation), "silu")
        if self.fixed.get("position") == "rotary":
            values |= write_rotary(model, self.share is not None)
        values |= _window_config(model, self.windows)
        if "mlp_only_layers" in self.defaults:
            values |= {"mlp_only_layers": list(range(model.dense_layers))}
        return {**values, "initializer_range": min(model.init_std, 1.0)}  # Llama's must be below


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
        return fields.count(theirs, most=LONGEST if ours == "sequence" else LARGEST_ENUMERATED)
    return fields.count(theirs)


def _windows(fields: Fields, where: str, layers: int) -> dict[str, Any]:
    """Return our window and the letters of its layers."""
    if where == "none" or not fields.has("sliding_window"):
        return {}
    if where in ("above", "switched") and not fields.flag("use_sliding_window"):  # others have no such key
        return {}
    letters = "S"
    types = fields.values.get("layer_types")
    if where == "uniform" and types != ["sliding_attention"] * layers and types is not None:
        raise fields.wrong("layer_types", "has layers without the window; transformers reads that as another family")
    if where in ("above", "alternating"):
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
    return next(letters[:n] for n in sizes if letters[n:] == letters[:-n])


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
        *(() if rotary and model.rotary_scaling != "none" else ("rotary_factor",)),
        *(() if rotary and model.rotary_scaling in ("llama3", "yarn") else ("rotary_original",)),
        *(() if model.position == "t5" else ("relative_buckets", "relative_distance")),
        *(() if model.attention_pattern != "full" else ("block_size", "local_blocks", "block_stride", "global_tokens")),
        *(() if model.experts is None or model.dense_layers else ("ffn",)),  # `expert_ffn` has what it gives experts
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
    value = _said(model).get(key, getattr(model, key))
    return str(value).lower() if isinstance(value, bool) else str(value)
