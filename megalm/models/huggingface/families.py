"""The families that are read and written: for each a table of its tensors' names, and its words for a model's choices.

A line of a table is (our logical name, how it is laid out, their names), see `mapping`; the other arguments of a
`Family` are described in `configs`. Rotary positions turn the pairs (j, j + R/2) of a head in all of them, as ours do,
so no rows of queries and keys change places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.errors import ConfigError
from megalm.models.huggingface.configs import Family
from megalm.models.huggingface.fields import Fields
from megalm.models.huggingface.mapping import (
    gated_experts,
    grouped,
    grouped_columns,
    keys_values,
    row,
    same,
    stacked,
    transposed,
)

_NONE = {"quantization_config": (None, "quantized weights")}
_SIZES = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "sequence": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_KEYS = {
    **_SIZES,
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
}
_LLAMA_FIXED = {"norm": "rmsnorm", "position": "rotary", "bias": False, "dropout": 0.0}
_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0}
_INVERSE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # of old files: it follows from the config

# Two norms, attention and a gated MLP by the names that Llama gave them.
_ENDS = (
    row("embedding.weight", same, "model.embed_tokens.weight"),
    row("final_norm.weight", same, "model.norm.weight"),
    row("head.weight", same, "lm_head.weight"),
)
_NORMS = (
    row("blocks.{n}.attention_norm.weight", same, "model.layers.{n}.input_layernorm.weight"),
    row("blocks.{n}.mlp_norm.weight", same, "model.layers.{n}.post_attention_layernorm.weight"),
)
_ATTENTION = (
    row(
        "blocks.{n}.attention.qkv.{x}",
        grouped,
        "model.layers.{n}.self_attn.q_proj.{x}",
        "model.layers.{n}.self_attn.k_proj.{x}",
        "model.layers.{n}.self_attn.v_proj.{x}",
    ),
    row("blocks.{n}.attention.q.{x}", same, "model.layers.{n}.self_attn.q_proj.{x}"),
    row(
        "blocks.{n}.attention.kv.{x}",
        keys_values,
        "model.layers.{n}.self_attn.k_proj.{x}",
        "model.layers.{n}.self_attn.v_proj.{x}",
    ),
    row("blocks.{n}.attention.out.{x}", same, "model.layers.{n}.self_attn.o_proj.{x}"),
)
_HEAD_NORMS = (
    row("blocks.{n}.attention.q_norm.weight", same, "model.layers.{n}.self_attn.q_norm.weight"),
    row("blocks.{n}.attention.k_norm.weight", same, "model.layers.{n}.self_attn.k_norm.weight"),
)
_MLP = (
    row("blocks.{n}.mlp.up.{x}", stacked, "model.layers.{n}.mlp.gate_proj.{x}", "model.layers.{n}.mlp.up_proj.{x}"),
    row("blocks.{n}.mlp.down.{x}", same, "model.layers.{n}.mlp.down_proj.{x}"),
)
_LLAMA_ROWS = (*_ENDS, *_NORMS, *_ATTENTION, *_MLP)

GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    rows=(
        row("embedding.weight", same, "transformer.wte.weight"),
        row("position.weight", same, "transformer.wpe.weight"),
        row("blocks.{n}.attention_norm.{x}", same, "transformer.h.{n}.ln_1.{x}"),
        row("blocks.{n}.attention.qkv.{x}", grouped_columns, "transformer.h.{n}.attn.c_attn.{x}"),
        row("blocks.{n}.attention.out.{x}", transposed, "transformer.h.{n}.attn.c_proj.{x}"),
        row("blocks.{n}.mlp_norm.{x}", same, "transformer.h.{n}.ln_2.{x}"),
        row("blocks.{n}.mlp.up.{x}", transposed, "transformer.h.{n}.mlp.c_fc.{x}"),
        row("blocks.{n}.mlp.down.{x}", transposed, "transformer.h.{n}.mlp.c_proj.{x}"),
        row("final_norm.{x}", same, "transformer.ln_f.{x}"),
        row("head.weight", same, "lm_head.weight"),
    ),
    keys={
        "vocab": "vocab_size",
        "layers": "n_layer",
        "hidden": "n_embd",
        "heads": "n_head",
        "ffn": "n_inner",
        "sequence": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={"norm": "layernorm", "position": "learned", "bias": True},
    defaults={
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
    },
    alike={"embd_pdrop": "resid_pdrop"},
    only={
        **_NONE,
        "scale_attn_weights": (True, "attention without a scale"),
        "scale_attn_by_inverse_layer_idx": (False, "attention scaled by the layer"),
        "add_cross_attention": (False, "cross-attention"),
    },
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    activation="activation_function",
    gated=False,
)
LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    rows=_LLAMA_ROWS,
    keys={
        **_LLAMA_KEYS,
        "head_dim": "head_dim",
        "bias": "mlp_bias",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
    },
    fixed=_LLAMA_FIXED,
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    only=_NONE,
    ignored=_INVERSE,
    even=True,
)
MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    rows=_LLAMA_ROWS,
    keys={**_LLAMA_KEYS, "head_dim": "head_dim"},
    fixed=_LLAMA_FIXED,
    defaults={**_LLAMA_DEFAULTS, "sliding_window": 4096, "num_key_value_heads": 8},
    only=_NONE,
    ignored=_INVERSE,
    windows="uniform",
)
QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    rows=_LLAMA_ROWS,
    keys=_LLAMA_KEYS,
    fixed={**_LLAMA_FIXED, "qkv_bias": True},
    defaults={
        **_LLAMA_DEFAULTS,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
    },
    only=_NONE,
    ignored=_INVERSE,
    windows="above",
)
QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    rows=(*_LLAMA_ROWS, *_HEAD_NORMS),
    keys={**_LLAMA_KEYS, "head_dim": "head_dim", "qkv_bias": "attention_bias", "out_bias": "attention_bias"},
    fixed={**_LLAMA_FIXED, "qk_norm": True},
    defaults={**QWEN2.defaults, "attention_bias": False, "head_dim": 128},
    only=_NONE,
    ignored=_INVERSE,
    windows="above",
)
QWEN3_MOE = Family(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    rows=(
        *_LLAMA_ROWS,
        *_HEAD_NORMS,
        row("blocks.{n}.mlp.router.weight", same, "model.layers.{n}.mlp.gate.weight"),
        row(
            "blocks.{n}.mlp.experts.up.weight",
            gated_experts,
            "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
            "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
        ),
        row("blocks.{n}.mlp.experts.down.weight", stacked, "model.layers.{n}.mlp.experts.{e}.down_proj.weight"),
    ),
    keys={
        **QWEN3.keys,
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn": "moe_intermediate_size",
    },
    fixed=QWEN3.fixed,
    defaults={
        **QWEN3.defaults,
        "head_dim": None,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    only={
        **_NONE,
        "norm_topk_prob": (True, "a router whose gates do not add up to one"),
        "decoder_sparse_step": (1, "experts in every so many layers"),
    },
    aliases={"num_local_experts": "num_experts"},
    windows="switched",
)
MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    rows=(
        *_ENDS,
        *_NORMS,
        *_ATTENTION,
        row("blocks.{n}.mlp.router.weight", same, "model.layers.{n}.block_sparse_moe.gate.weight"),
        row(
            "blocks.{n}.mlp.experts.up.weight",
            gated_experts,
            "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
            "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
        ),
        row("blocks.{n}.mlp.experts.down.weight", stacked, "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight"),
    ),
    keys={
        **{ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "ffn"},
        "head_dim": "head_dim",
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn": "intermediate_size",
    },
    fixed=_LLAMA_FIXED,
    defaults={
        **_LLAMA_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
    },
    only={**_NONE, "router_jitter_noise": (0.0, "noise in what the router sees while it trains")},
    ignored=_INVERSE,
    theta=1e6,
    windows="all",
)
GEMMA2 = Family(
    name="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    rows=(
        *_ENDS,
        *_ATTENTION,
        *_MLP,
        row("blocks.{n}.attention_norm.weight", same, "model.layers.{n}.input_layernorm.weight"),
        row("blocks.{n}.attention_out_norm.weight", same, "model.layers.{n}.post_attention_layernorm.weight"),
        row("blocks.{n}.mlp_norm.weight", same, "model.layers.{n}.pre_feedforward_layernorm.weight"),
        row("blocks.{n}.mlp_out_norm.weight", same, "model.layers.{n}.post_feedforward_layernorm.weight"),
    ),
    keys={
        **_LLAMA_KEYS,
        "head_dim": "head_dim",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "scores_head_dim": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    fixed={**_LLAMA_FIXED, "norm": "rmsnorm_zero_centered", "norm_place": "sandwich"},
    defaults={
        **_LLAMA_DEFAULTS,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "attention_bias": False,
    },
    only={**_NONE, "use_bidirectional_attention": (False, "attention to later tokens")},
    ignored=_INVERSE,
    activation="hidden_activation",
    even=True,
    windows="alternating",
)
GPT_NEOX = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    rows=(
        row("embedding.weight", same, "gpt_neox.embed_in.weight"),
        row("blocks.{n}.attention_norm.{x}", same, "gpt_neox.layers.{n}.input_layernorm.{x}"),
        row("blocks.{n}.attention.qkv.{x}", same, "gpt_neox.layers.{n}.attention.query_key_value.{x}"),  # by heads
        row("blocks.{n}.attention.out.{x}", same, "gpt_neox.layers.{n}.attention.dense.{x}"),
        row("blocks.{n}.mlp_norm.{x}", same, "gpt_neox.layers.{n}.post_attention_layernorm.{x}"),
        row("blocks.{n}.mlp.up.{x}", same, "gpt_neox.layers.{n}.mlp.dense_h_to_4h.{x}"),
        row("blocks.{n}.mlp.down.{x}", same, "gpt_neox.layers.{n}.mlp.dense_4h_to_h.{x}"),
        row("final_norm.{x}", same, "gpt_neox.final_layer_norm.{x}"),
        row("head.weight", same, "embed_out.weight"),
    ),
    keys={
        **_SIZES,
        "ffn": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "parallel_residual": "use_parallel_residual",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
    },
    fixed={"norm": "layernorm", "position": "rotary", "bias": True},
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    only=_NONE,
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    gated=False,
    share=0.25,
)

FAMILIES = {
    family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GEMMA2, GPT_NEOX)
}

MISSING: Mapping[str, str] = {
    "bert": "attention to later tokens (bidirectional), token types (token_type_embeddings), a norm behind the "
    "embedding's sum before post-norm blocks, and a masked-language-model head with a layer and a bias of its own",
    "t5": "an encoder, cross-attention from the decoder to it, one table of relative positions that all layers share, "
    "and attention without a scale",
}
"""Families whose models megalm cannot express, and what of them it lacks: it trains decoders only."""


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """Return the family of a `config.json`. Raises ConfigError for one that megalm does not have, naming what lacks."""
    kind = values.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    if kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join(FAMILIES)
    if kind in MISSING:
        raise ConfigError(f"{where}: model_type={kind} needs {MISSING[kind]}; megalm reads {known}")
    raise Fields(values, where).wrong("model_type", f"is no family that megalm reads; it reads {known}")
