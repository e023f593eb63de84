"""What Megatron-LM and Megatron-DeepSpeed call the tensors of a GPT, how their tensor ranks divide them, and ours.

Their names are those of megatron.core, with or without Transformer Engine, which has a norm inside the linear layer
behind it, and the older ones that Megatron-DeepSpeed still has. A linear layer's weight is [out, in] in all. The fused
projection has, for each group of queries, the queries, their gates where there are any, the key and the value, as ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megalm.config.model import ModelSection

Join = Callable[[Sequence[Tensor]], Tensor]
"""Makes a whole tensor of those of the tensor ranks, in their order."""


def whole(parts: Sequence[Tensor]) -> Tensor:
    """Return what every tensor rank holds whole: the first one's."""
    return parts[0]


def rows(parts: Sequence[Tensor]) -> Tensor:
    """Return a tensor whose output features are divided: a column-parallel layer's weight or bias, or a vocabulary."""
    return torch.cat(list(parts), dim=0)


def columns(parts: Sequence[Tensor]) -> Tensor:
    """Return a weight whose input features are divided: a row-parallel layer's."""
    return torch.cat(list(parts), dim=1)


def gated_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return [2, F, ...] of ranks that each have their rows of the gate and then their rows of what it multiplies."""
    return torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1)


class Place(NamedTuple):
    """Where a tensor belongs: our name, and how the tensor ranks' parts become one."""

    name: str
    join: Join


LAYER: dict[str, Place] = {
    # megatron.core
    "input_layernorm.weight": Place("attention_norm.weight", whole),
    "input_layernorm.bias": Place("attention_norm.bias", whole),
    "self_attention.linear_qkv.weight": Place("attention.qkv.weight", rows),
    "self_attention.linear_qkv.bias": Place("attention.qkv.bias", rows),
    "self_attention.q_layernorm.weight": Place("attention.q_norm.weight", whole),
    "self_attention.k_layernorm.weight": Place("attention.k_norm.weight", whole),
    "self_attention.linear_proj.weight": Place("attention.out.weight", columns),
    "self_attention.linear_proj.bias": Place("attention.out.bias", whole),
    "pre_mlp_layernorm.weight": Place("mlp_norm.weight", whole),
    "pre_mlp_layernorm.bias": Place("mlp_norm.bias", whole),
    "mlp.linear_fc1.weight": Place("mlp.up.weight", rows),
    "mlp.linear_fc1.bias": Place("mlp.up.bias", rows),
    "mlp.linear_fc2.weight": Place("mlp.down.weight", columns),
    "mlp.linear_fc2.bias": Place("mlp.down.bias", whole),
    # megatron.core with Transformer Engine
    "self_attention.linear_qkv.layer_norm_weight": Place("attention_norm.weight", whole),
    "self_attention.linear_qkv.layer_norm_bias": Place("attention_norm.bias", whole),
    "mlp.linear_fc1.layer_norm_weight": Place("mlp_norm.weight", whole),
    "mlp.linear_fc1.layer_norm_bias": Place("mlp_norm.bias", whole),
    # before megatron.core, and Megatron-DeepSpeed; it has the norms of megatron.core's names
    "self_attention.query_key_value.weight": Place("attention.qkv.weight", rows),
    "self_attention.query_key_value.bias": Place("attention.qkv.bias", rows),
    "self_attention.dense.weight": Place("attention.out.weight", columns),
    "self_attention.dense.bias": Place("attention.out.bias", whole),
    "post_attention_layernorm.weight": Place("mlp_norm.weight", whole),
    "post_attention_layernorm.bias": Place("mlp_norm.bias", whole),
    "post_attention_norm.weight": Place("mlp_norm.weight", whole),
    "post_attention_norm.bias": Place("mlp_norm.bias", whole),
    "input_norm.weight": Place("attention_norm.weight", whole),
    "input_norm.bias": Place("attention_norm.bias", whole),
    "mlp.dense_h_to_4h.weight": Place("mlp.up.weight", rows),
    "mlp.dense_h_to_4h.bias": Place("mlp.up.bias", rows),
    "mlp.dense_4h_to_h.weight": Place("mlp.down.weight", columns),
    "mlp.dense_4h_to_h.bias": Place("mlp.down.bias", whole),
}
"""Of a layer: what stands behind `decoder.layers.N.` or `language_model.encoder.layers.N.` -> behind `blocks.N.`."""

EMBEDDING = Place("embedding.weight", rows)
ENDS: dict[str, Place] = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "embedding.position_embeddings.weight": Place("position.weight", whole),
    "final_layernorm.weight": Place("final_norm.weight", whole),
    "final_layernorm.bias": Place("final_norm.bias", whole),
    "final_norm.weight": Place("final_norm.weight", whole),
    "final_norm.bias": Place("final_norm.bias", whole),
    "output_layer.weight": Place("head.weight", rows),
    "word_embeddings_for_head.weight": Place("head.weight", rows),
}
"""Of both ends of the model, without `decoder.` and the like; the last is the tied embedding's copy."""

_PREFIX = re.compile(r"^(module\.)*(language_model\.)?((decoder|encoder|transformer)\.)?")
_LAYER = re.compile(r"^layers\.([0-9]{1,6})\.(.+)$")
_NO_WEIGHTS = re.compile(
    r"(_extra_state[0-9]*$)|(^(.*\.)?(rotary_pos_emb|core_attention)\.(inv_freq|.*_extra_state.*)$)"
)


def is_no_weight(name: str) -> bool:
    """Return whether a name is that of state which is made anew: fp8's scales, rotary frequencies."""
    return _NO_WEIGHTS.search(name) is not None


def place_of(name: str) -> tuple[int | None, Place] | None:
    """Return the layer, as the name counts (None: of an end), and the place of a tensor; None: it has none."""
    rest = _PREFIX.sub("", name)
    layer = _LAYER.match(rest)
    if layer is None:
        return (None, ENDS[rest]) if rest in ENDS else None
    inner = layer[2]
    if inner.startswith("attention."):  # of the oldest ones
        inner = f"self_{inner}"
    return (int(layer[1]), LAYER[inner]) if inner in LAYER else None


def joined(place: Place, parts: Sequence[Tensor], model: ModelSection) -> list[tuple[str, Tensor]]:
    """Return our tensors, with their names, of one of theirs: two where keys and values have a weight of their own."""
    name = place.name
    is_up = name.startswith("mlp.up.")
    made = (gated_rows if is_up and model.has_gated_activation else place.join)(parts)
    if name.startswith("attention.qkv.") and model.key_value_heads == 1 and model.heads > 1:
        q, kv = made.split((made.shape[0] - 2 * model.head_size, 2 * model.head_size), dim=0)
        if model.attention_gate:
            q = q.unflatten(0, (2, -1))
        kind = name.rpartition(".")[2]
        return [(f"attention.q.{kind}", q), (f"attention.kv.{kind}", kv)]
    return [(name, made)]
