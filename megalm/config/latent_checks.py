"""The rules of latent attention (`model.kv_rank`): what a head is made of, and what it excludes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


@rule(
    "model.kv_rank",
    "model.kv_heads",
    "model.head_dim",
    "model.rotary_share",
    "model.qk_norm",
    "model.attention_gate",
    "model.qkv_bias",
)
def _latents_exclude_other_heads(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.kv_rank is None:
        return
    for key, excluded, reason in (
        ("kv_heads", model.kv_heads is not None, "which makes keys and values of each head; leave it out"),
        ("head_dim", model.head_dim is not None, "whose heads have two parts; use rope_head_dim and nope_head_dim"),
        ("rotary_share", model.rotary_share != 1.0, "of whose heads rope_head_dim features turn; leave it out"),
        ("qk_norm", model.qk_norm, "whose norms are those of the latents; use model.qk_norm=false"),
        ("attention_gate", model.attention_gate, "whose projections have no gates; use model.attention_gate=false"),
        ("qkv_bias", model.qkv_bias is not None, "whose projections have no biases; leave it out"),
    ):
        if excluded:
            value = str(getattr(model, key)).lower()
            yield f"model.{key}={value} does not go with latent attention (model.kv_rank={model.kv_rank}), {reason}"


@rule("model.kv_rank", "model.rope_head_dim", "model.position")
def _what_turns_is_made_of_pairs(config: RunConfig) -> Iterator[str]:
    model, size = config.model, config.model.rope_head_dim
    if model.is_latent and model.position == "rotary" and size is not None and size % 2:
        yield f"model.rope_head_dim={size} is odd, and model.position=rotary turns pairs of features; use {size + 1}"


@rule(
    "model.kv_rank",
    "model.rope_head_dim",
    "model.nope_head_dim",
    "model.value_head_dim",
    "model.hidden",
    "model.heads",
)
def _values_fit_into_keys(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.is_latent and model.value_size > model.head_size:
        yield (
            f"model.value_head_dim={model.value_size} is more than the {model.head_size} features of a key, up to "
            f"which attention pads values; use at most {model.head_size}"
        )
