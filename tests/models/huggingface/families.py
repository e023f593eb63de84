"""Random models of transformers, several configurations of each family, for tests that hold ours to them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB = 67
"""Prime, so that no number of ranks divides it."""

_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 4}
_NEOX = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_MOE = {**_LLAMA, "num_key_value_heads": 4}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2 untied, wide, exact gelu": (
        "gpt2",
        {**_GPT2, "n_head": 6, "n_inner": 100, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "llama": ("llama", _LLAMA),
    "llama 3, grouped, tied": (
        "llama",
        {**_LLAMA, "num_key_value_heads": 2, "rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    ),
    "llama, one key head, biases of attention, large heads": (
        "llama",
        {**_LLAMA, "num_key_value_heads": 1, "attention_bias": True, "head_dim": 20, "rope_parameters": _YARN},
    ),
    "llama, biases of the mlp": ("llama", {**_LLAMA, "mlp_bias": True, "hidden_size": 40}),
    "mistral": ("mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral without a window": ("mistral", {**_LLAMA, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {**_LLAMA, "num_key_value_heads": 2}),
    "qwen2 with windows above, tied": (
        "qwen2",
        {
            **_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**_LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3 with biases and windows": (
        "qwen3",
        {
            **_LLAMA, "head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
            "max_window_layers": 3,
        },
    ),
    "gpt-neox": ("gpt_neox", _NEOX),
    "gpt-neox, one half after the other, tied": (
        "gpt_neox",
        {
            **_NEOX, "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gemma 2": (
        "gemma2",
        {**_LLAMA, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6},
    ),
    "gemma 2 without caps, untied": (
        "gemma2",
        {
            **_LLAMA, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 6, "attention_bias": True,
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("mixtral", {**_MOE, "num_local_experts": 4}),
    "mixtral, three of five experts, a window": (
        "mixtral",
        {**_MOE, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6, "num_key_value_heads": 2},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **_LLAMA, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
            "norm_topk_prob": True, "mlp_only_layers": [0],
        },
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model, whose weights, biases and norms among them, are larger than at the start."""
    import transformers

    kind, values = CONFIGS[name]
    torch.manual_seed(sorted(CONFIGS).index(name))
    config = transformers.AutoConfig.for_model(kind, **values, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        around = float(parameter.detach().mean().round()) if parameter.dim() == 1 else 0.0  # norms' weights are ones
        torch.nn.init.normal_(parameter, mean=around, std=0.25)
    return model.to(dtype)


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32, shard_bytes: int | None = None) -> Path:
    """Write transformers' model as it saves itself, and return the directory."""
    shutil.rmtree(directory, ignore_errors=True)
    build(name, dtype).save_pretrained(directory, max_shard_size=shard_bytes or "1GB")
    return directory


@torch.no_grad()
def logits(name: str, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return transformers' logits, in float64 from float64 weights where that is the dtype."""
    found: Tensor = build(name, dtype)(tokens, use_cache=False).logits
    return found


def some_tokens() -> Tensor:
    """Return rows that windows hide a part of."""
    return torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
