"""The model that the arguments of Megatron-LM or Megatron-DeepSpeed describe, as a recipe's section `model`.

What a recipe cannot express is refused by the name of the argument. Arguments that say how a model was trained or
computed (parallelism, fusions, recomputation, initial values) do not count, as they leave its function alone; dropout
is taken over, since training may go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megalm.errors import CheckpointError

Arguments = Mapping[str, Any]

_REFUSED: dict[str, str] = {
    "num_experts": "experts, whose names differ by version",
    "multi_latent_attention": "latent attention",
    "mtp_num_layers": "predictions of further tokens",
    "apply_residual_connection_post_layernorm": "a residual stream of normed states",
    "hybrid_layer_pattern": "layers that are no Transformer's",
    "hybrid_override_pattern": "layers that are no Transformer's",
    "is_hybrid_model": "layers that are no Transformer's",
    "heterogeneous_layers_config_path": "layers of different shapes",
    "heterogeneous_layers_config_encoded_json": "layers of different shapes",
    "experimental_attention_variant": "other attention than softmax over all keys",
    "linear_attention_freq": "other attention than softmax over all keys",
    "rotary_interleaved": "rotary pairs (2j, 2j+1)",
    "quick_geglu": "a gate by x sigmoid(1.702 x)",
    "activation_func_clamp_value": "a bound of what activations get",
    "use_mup": "muP of other scales",
    "softmax_scale": "a factor of scores",
    "qk_l2_norm": "queries and keys normed without weights",
    "retro_add_retriever": "retrieval",
}
"""Arguments that name what a recipe does not have, where they are set; value: what they are."""
_UNSET: tuple[Any, ...] = (None, False, 0, "", [], [1])
"""The values of an argument that asks for nothing; Megatron-DeepSpeed has one expert in the list of all layers'."""
_FINE: dict[str, tuple[Any, ...]] = {
    "glu_linear_offset": (0.0, 0),
    "softmax_type": ("vanilla",),
}
"""Arguments that a recipe has no key for, with the values at which it needs none."""


def model_of(given: Arguments, path: str) -> dict[str, Any]:
    """Return the section `model` that arguments describe, without `vocab`. Raises CheckpointError naming the argument.

    `path` is where they come from, for messages.
    """
    for name, what in _REFUSED.items():
        if given.get(name) not in _UNSET:
            raise refused(path, name, given[name], f"the recipe has no key for {what}")
    for name, values in _FINE.items():
        if given.get(name) is not None and given[name] not in values:
            raise refused(path, name, given[name], f"the recipe has no key for other values than {values[0]}")
    need = _Needed(given, path)
    model: dict[str, Any] = {
        "layers": need.number("num_layers"),
        "hidden": need.number("hidden_size"),
        "heads": need.number("num_attention_heads"),
        "sequence": _sequence(need),
        "tie_embeddings": not given.get("untie_embeddings_and_output_weights", False),
        "dropout": _number(given, path, ("hidden_dropout",), 0.0),
        "attention_dropout": _number(given, path, ("attention_dropout",), 0.0),
    }
    model["ffn"] = need.number("ffn_hidden_size")
    if given.get("kv_channels") is not None:
        model["head_dim"] = need.number("kv_channels")
    groups = _query_groups(given)
    if groups is not None and groups != model["heads"]:
        model["kv_heads"] = groups
    return {**model, **_norm(given, path), **_biases(given), **_activation(given), **_position(given, path, model),
            **_attention(given, path)}  # fmt: skip


def zero_centered(given: Arguments) -> bool:
    """Return whether the weights of norms are stored less 1."""
    return bool(given.get("apply_layernorm_1p") or given.get("layernorm_zero_centered_gamma"))


def refused(path: str, name: str, value: Any, reason: str) -> CheckpointError:
    """Return the error for an argument that cannot be imported."""
    return CheckpointError(f"{path}: its argument {name}={value!r:.80} cannot be imported: {reason}")


class _Needed:
    """Arguments that must be there."""

    def __init__(self, given: Arguments, path: str) -> None:
        self.given, self.path = given, path

    def number(self, name: str) -> int:
        value = self.given.get(name)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self.path}: its arguments have {name}={value!r:.80} where a whole number is needed"
            )
        return value


def _number(given: Arguments, path: str, names: Sequence[str], default: float) -> float:
    """Return the first of some arguments that is set. Raises CheckpointError for one that is no number."""
    name = next((name for name in names if given.get(name) is not None), None)
    if name is None:
        return default
    if type(given[name]) not in (int, float) or not abs(given[name]) < 1e15:
        raise refused(path, name, given[name], "it is no number")
    return float(given[name])


def _sequence(need: _Needed) -> int:
    """Return the longest row: as many positions as there are."""
    key = "max_position_embeddings" if need.given.get("max_position_embeddings") is not None else "seq_length"
    return need.number(key)


def _query_groups(given: Arguments) -> int | None:
    """Return the heads of keys and values. Megatron-LM's number counts with --group-query-attention only."""
    if "num_key_value_heads" in given:
        return given["num_key_value_heads"]
    return given.get("num_query_groups") if given.get("group_query_attention") else None


def _norm(given: Arguments, path: str) -> dict[str, Any]:
    kind = str(given.get("normalization") or "LayerNorm")
    names = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
    if kind.lower() not in names:
        raise refused(path, "normalization", kind, "the recipe has LayerNorm and RMSNorm")
    eps = _number(given, path, ("norm_epsilon", "layernorm_epsilon"), 1e-5)
    norm = names[kind.lower()]
    if norm == "layernorm" and not given.get("add_bias_linear", True):
        raise refused(path, "add_bias_linear", False, "LayerNorm has a bias there, and here only with linear layers'")
    return {"norm": norm, "norm_eps": eps}


def _biases(given: Arguments) -> dict[str, Any]:
    bias = bool(given.get("add_bias_linear", True))
    return {"bias": bias, "qkv_bias": bias or bool(given.get("add_qkv_bias", False))}


def _activation(given: Arguments) -> dict[str, Any]:
    """Return the activation. Fused with the bias gelu is that of tanh, by itself that of erf."""
    if given.get("swiglu"):
        return {"activation": "swiglu"}
    if given.get("squared_relu"):
        return {"activation": "relu2"}
    fused = given.get("bias_gelu_fusion", True) and given.get("add_bias_linear", True)
    by_engine = given.get("use_te_activation_func")  # Transformer Engine has gelu by tanh alone
    by_tanh = given.get("openai_gelu") or by_engine or (fused and not given.get("onnx_safe"))
    return {"activation": "gelu" if by_tanh else "gelu_erf"}


def _position(given: Arguments, path: str, model: Arguments) -> dict[str, Any]:
    kind = given.get("position_embedding_type") or "learned_absolute"
    if given.get("use_rotary_position_embeddings"):
        kind = "rope"
    elif given.get("add_position_embedding") is False and kind == "learned_absolute":
        kind = "none"
    if kind in ("learned_absolute", "none"):
        return {"position": "learned" if kind == "learned_absolute" else "none"}
    if kind != "rope":
        raise refused(path, "position_embedding_type", kind, "the recipe has none, learned_absolute and rope")
    bases = ("rotary_base", "rope_theta", "rotary_position_embeddings_theta")
    found: dict[str, Any] = {"position": "rotary", "rotary_base": _number(given, path, bases, 10000.0)}
    share = _number(given, path, ("rotary_percent",), 1.0)
    if share != 1.0:
        found["rotary_share"] = share
    if given.get("use_rope_scaling"):
        factor = _number(given, path, ("rope_scaling_factor",), 8.0)
        found |= {"rotary_scaling": "llama3", "rotary_factor": factor, "rotary_original": 8192}
    stretched = _number(given, path, ("rotary_seq_len_interpolation_factor",), 1.0)
    if stretched != 1.0:
        if "rotary_scaling" in found:
            raise refused(path, "rotary_seq_len_interpolation_factor", stretched, "use_rope_scaling is set too")
        found |= {"rotary_scaling": "linear", "rotary_factor": stretched}
    every = given.get("no_rope_freq")
    if every not in (None, 0):
        if type(every) is not int:
            raise refused(path, "no_rope_freq", every, "the recipe has every n-th layer, by a number")
        found["nope_every"] = every
    return found


def _attention(given: Arguments, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if given.get("qk_layernorm"):
        if str(given.get("normalization") or "LayerNorm").lower() != "rmsnorm":
            raise refused(path, "qk_layernorm", True, "queries and keys are normed by RMSNorm here")
        found["qk_norm"] = True
    if given.get("attention_output_gate"):
        found["attention_gate"] = True
    window = given.get("window_size")
    if window is None or window in ([-1, 0], [-1, -1]):
        return found
    if not isinstance(window, list) or len(window) != 2 or type(window[0]) is not int or window[0] < 0:
        raise refused(path, "window_size", window, "the recipe has a number of tokens before a query")
    found["window"] = window[0] + 1  # the query's own token counts here
    skipped = given.get("window_attn_skip_freq")
    if type(skipped) is int and skipped > 0:
        found["window_pattern"] = "S" * (skipped - 1) + "L"
    elif isinstance(skipped, list):
        found["window_pattern"] = "".join("S" if layer else "L" for layer in skipped)
    return found
