"""The names that a recipe may use wherever it chooses an implementation by name.

They stand here apart from the registries so that a recipe can be checked without importing torch; a test
holds each tuple equal to the registry of the same name.
"""

from __future__ import annotations

CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", "fp64"),
    "kernels": ("auto", "fused", "reference"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "position": ("learned", "rotary"),
    "schedule": ("gpipe", "1f1b"),
    "recompute": ("none", "full"),
    "optimizer": ("adamw", "fused_adamw", "sgd"),
    "lr_schedule": ("cosine", "constant"),
}
