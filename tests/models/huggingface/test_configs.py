"""A config.json means what transformers makes of it, or is refused by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import megalm
from megalm.config.load import load_recipe
from megalm.config.model import ModelSection
from megalm.errors import ConfigError
from megalm.models.huggingface.configs import differences, shortest
from megalm.models.huggingface.exporting import choose
from megalm.models.huggingface.families import FAMILIES, family_of
from tests.models.huggingface.plain import values_of

YARN = "llama, one key head, biases of attention, large heads"
READ: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mistral", {"use_sliding_window": False}, {"window": 7}),  # a key of other families
    ("mistral", {"layer_types": ["sliding_attention"] * 4}, {"window": 7}),
    ("mixtral, three of five experts, a window", {"use_sliding_window": False}, {"window": 6}),
    ("mixtral", {"router_jitter_noise": 0.0}, {"experts": 4}),
    ("gemma 2", {"use_sliding_window": False}, {"window": 6, "window_pattern": "SL"}),
    ("qwen2 with windows above, tied", {"use_sliding_window": False}, {"window": None}),
    ("llama 3, grouped, tied", {"original_max_position_embeddings": 32}, {"rotary_original": 32}),
    (YARN, {"original_max_position_embeddings": 32}, {"rotary_original": 32}),
    ("llama", {"rotary_emb_base": 500.0}, {"rotary_base": 10000.0}),
    ("gpt-neox", {"rotary_emb_base": 500.0, "rotary_pct": 0.5}, {"rotary_base": 500.0, "rotary_share": 0.5}),
    ("gpt-neox", {"rope_theta": 10000, "partial_rotary_factor": 0.25}, {"rotary_base": 1e4, "rotary_share": 0.25}),
    ("gpt2", {"embd_pdrop": 0.3, "resid_pdrop": 0.3}, {"dropout": 0.3}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types="),
    ("mistral", {"layer_types": 5}, "layer_types="),
    ("gpt-neox", {"rope_theta": 500.0}, r"rope_theta=500\.0 contradicts rotary_emb_base, .*takes 10000\.0"),
    ("gpt-neox", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 contradicts rotary_pct"),
    (
        "gpt-neox, one half after the other, tied",
        {"rotary_emb_base": 7.0},
        r"rotary_emb_base=7\.0 contradicts rope_theta of rope_par",
    ),
    ("llama 3, grouped, tied", {"rope_theta": 1e4}, r"rope_theta=10000\.0 contradicts rope_theta of rope_par"),
    ("gpt2", {"embd_pdrop": 0.3}, r"embd_pdrop=0\.3 is not resid_pdrop=0\.1"),
    ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 is noise"),
    ("llama", {"hidden_size": 50, "head_dim": 12}, "hidden_size=50 is no multiple of num_attention_heads"),
    ("gemma 2", {"hidden_size": 50}, "hidden_size=50 is no multiple of num_attention_heads"),
    ("llama", {"rms_norm_eps": 0.0}, r"rms_norm_eps \(model\.norm_eps\)"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), READ)
def test_a_key_is_read_where_transformers_reads_it(
    name: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    section = _section({**values_of(name), **changes})
    assert {key: getattr(section, key) for key in expected} == expected


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_what_contradicts_is_refused_by_file_and_key(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^DIR/config\.json: {reason}"):
        _section({**values_of(name), **changes})


def _section(values: dict[str, Any]) -> ModelSection:
    where = "DIR/config.json"
    return ModelSection.model_validate(family_of(values, where).section(values, where))


NEOX: dict[str, Any] = {
    "layers": 2, "hidden": 40, "heads": 2, "sequence": 16, "norm": "layernorm", "position": "rotary", "bias": True,
    "activation": "gelu_erf", "tie_embeddings": False, "parallel_residual": True,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "layers": 2, "hidden": 8, "heads": 2, "sequence": 16, "norm": "rmsnorm", "position": "rotary", "bias": False,
    "activation": "swiglu", "tie_embeddings": False,
}  # fmt: skip
WRITTEN: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({**NEOX, "rotary_share": 0.25}, "gpt_neox", {"rotary_pct": 0.2}),  # 4 of 20 features, not 5
    ({**NEOX, "hidden": 96, "rotary_share": 0.3}, "gpt_neox", {"rotary_pct": 0.3}),
    ({**LLAMA, "rotary_scaling": "linear", "rotary_factor": 2.0, "rotary_original": 16}, "llama", {}),
    ({**LLAMA, "init_std": 2.0}, "llama", {"initializer_range": 1.0}),
    ({**LLAMA, "hidden": 10, "heads": 4, "head_dim": 4}, "mistral", {"hidden_size": 10}),
    ({**LLAMA, "experts": 4}, "mixtral", {"intermediate_size": 64}),
    ({**LLAMA, "experts": 4, "ffn": 24}, "mixtral", {"intermediate_size": 24}),
    ({**LLAMA, "experts": 4, "ffn": 24, "expert_ffn": 12}, "mixtral", {"intermediate_size": 12}),
    ({**LLAMA, "experts": 4, "ffn": 24, "qk_norm": True}, "qwen3_moe", {"moe_intermediate_size": 24}),
    (
        {**NEOX, "position": "learned", "parallel_residual": False, "dropout": 0.2}, "gpt2",
        {"embd_pdrop": 0.2, "resid_pdrop": 0.2, "attn_pdrop": 0.2},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "kind", "expected"), WRITTEN)
def test_a_config_is_written_as_transformers_accepts_it(
    model: dict[str, Any], kind: str, expected: dict[str, Any]
) -> None:
    family, values = choose(ModelSection.model_validate(model), 13, None)
    assert family.model_type == kind
    assert {key: values[key] for key in expected} == expected


RECIPES = {
    "gpt-124m": "gpt2", "gpt-1b": "gpt2", "gpt-22b": "gpt2", "gpt-175b": "gpt2", "gpt-tiny": "llama",
    "llama-8b": "llama", "llama-405b": "llama", "mixtral-8x7b": "mixtral",
}  # fmt: skip


def test_every_recipe_that_is_shipped_is_here() -> None:
    folder = Path(megalm.__file__).with_name("recipes")
    assert {path.stem for path in folder.glob("*.yaml")} == RECIPES.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_is_shipped_can_be_exported(recipe: str) -> None:
    family, values = choose(load_recipe(recipe).model, 512, None)
    assert family.model_type == RECIPES[recipe]
    section = family.section(values, "config.json")
    assert differences(load_recipe(recipe).model.model_copy(update={"vocab": 512}), section) == []


def test_every_family_can_be_asked_for_and_is_then_the_only_one() -> None:
    model = ModelSection.model_validate({**LLAMA, "qkv_bias": True})
    with pytest.raises(ConfigError, match=r"^--family=mistral: Mistral has no model\.qkv_bias=true;"):
        choose(model, 13, "qwen2", "mistral")
    assert choose(model, 13, "mistral", None)[0] is FAMILIES["qwen2"]
    derived = ModelSection.model_validate({**LLAMA, "bias": True})
    with pytest.raises(ConfigError, match=r"model\.bias=true, model\.qkv_bias=true, model\.out_bias=true;"):
        choose(derived, 13, None, "mistral")
    one = ModelSection.model_validate({**LLAMA, "experts": 4, "experts_per_token": 1})
    with pytest.raises(ConfigError, match=r"^Mixtral is no family for this model: its config\.json: num_experts_per_t"):
        choose(one, 13, None, "mixtral")


def test_a_family_that_refuses_a_model_is_never_the_nearest() -> None:
    """One reason given by a refusal is no smaller lack than two keys."""
    model = ModelSection.model_validate(
        {**LLAMA, "experts": 4, "experts_per_token": 1, "attention_sinks": True, "attention_gate": True}
    )
    with pytest.raises(ConfigError, match=r"has model\..*attention_sinks=true.* has all else\)") as caught:
        choose(model, 13, None)
    assert "Mixtral" not in str(caught.value)


@pytest.mark.parametrize(
    ("letters", "pattern"), [("SLSL", "SL"), ("SLS", "SL"), ("SSSL", "SSSL"), ("S", "S"), ("LLSLLSL", "LLS")]
)
def test_the_shortest_pattern_gives_the_letters(letters: str, pattern: str) -> None:
    assert shortest(letters) == pattern
