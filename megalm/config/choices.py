"""The names that a recipe may use wherever it chooses an implementation by name.

They stand here apart from the registries so that a recipe can be checked without importing torch; a test
holds each tuple equal to the registry of the same name.
"""

from __future__ import annotations

CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", "fp16", "fp64"),
    "fp8": ("none", "tensorwise", "rowwise", "rowwise_with_gw_hp"),
    "reduce_dtype": ("fp32", "bf16"),
    "kernels": ("auto", "fused", "reference"),
    "norm": ("layernorm", "rmsnorm", "rmsnorm_zero_centered"),
    "norm_place": ("pre", "post", "sandwich"),
    "activation": ("relu", "relu2", "gelu", "gelu_erf", "silu", "geglu", "swiglu"),
    "position": ("none", "learned", "sinusoidal", "rotary", "alibi", "t5"),
    "attention_pattern": ("full", "strided", "hierarchical"),
    "router_score": ("softmax", "sigmoid"),
    "init": ("normal", "truncated_normal", "xavier", "he"),
    "rotary_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    "rows": ("stream", "documents"),
    "context_attention": ("ring", "ulysses"),
    "schedule": ("gpipe", "1f1b", "interleaved", "breadth-first", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"),
    "recompute": ("none", "selective", "full"),
    "optimizer": (
        "adamw",
        "fused_adamw",
        "adam",
        "lion",
        "sgd",
        "rmsprop",
        "adagrad",
        "adafactor",
        "muon",
        "adamw8bit",
        "apex_adamw",
    ),
    "adjust_lr_fn": ("match_rms_adamw", "original"),
    "state_dtype": ("bf16",),
    "lr_schedule": ("constant", "linear", "cosine", "exponential", "step", "inverse_sqrt"),
    "sink": ("tensorboard", "wandb"),
    "stop_metric": (
        "evaluate/loss",
        "evaluate/perplexity",
        "evaluate/bits_per_byte",
        "evaluate/ema_loss",
        "train/loss",
        "optim/grad_norm",
    ),
    "cooldown_shape": ("linear", "cosine", "sqrt"),
}

LOOPED_SCHEDULES = ("interleaved", "breadth-first")
"""Those with `parallel.virtual_stages` chunks a stage."""
FOLDED_SCHEDULES = ("zb-v", "dualpipe-v")
"""Those with two chunks a stage, the first and the last layer on the first stage."""
SPLITTING_SCHEDULES = ("zb-h1", "zb-h2", *FOLDED_SCHEDULES)
"""Those that make the gradients of weights in actions of their own."""
