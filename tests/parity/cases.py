"""The layouts of the parity gate, and what they are held to."""

from __future__ import annotations

from typing import Any

from tests.parity.harness import LLAMA, Case, Difference
from tests.parity.options import BALANCED as BALANCED
from tests.parity.options import EXPERTS as EXPERTS
from tests.parity.options import FULL as FULL

STEPS = 30

DROPOUT: dict[str, Any] = {"model.dropout": 0.1}
SMOOTHING: dict[str, Any] = {"loss.label_smoothing": 0.1}
UNTIED: dict[str, Any] = {"model.tie_embeddings": False}
SEQUENCE: dict[str, Any] = {"parallel.sequence": True}
GPIPE: dict[str, Any] = {"parallel.schedule": "gpipe"}
RECOMPUTE: dict[str, Any] = {"train.recompute": "full"}
SELECTIVE: dict[str, Any] = {"train.recompute": "selective"}
EIGHT: dict[str, Any] = {"model.layers": 8}
FUSED_HEAD: dict[str, Any] = {"loss.fused_head": True}
UNFUSED_ATTENTION: dict[str, Any] = {"model.flash_attention": False}
OUR_ADAMW: dict[str, Any] = {"optim.kind": "fused_adamw"}
PAD: dict[str, Any] = {"train.pad_batch": True}
MUON: dict[str, Any] = {"optim.kind": "muon"}
RING: dict[str, Any] = {"parallel.context": 2}
RING_OF_FOUR: dict[str, Any] = {"parallel.context": 4}
ULYSSES: dict[str, Any] = {"parallel.context": 2, "parallel.context_attention": "ulysses"}
PACKED: dict[str, Any] = {"model.document_mask": True}
WINDOWS: dict[str, Any] = {"model.window": 5, "model.window_pattern": "SSL"}
ALIBI: dict[str, Any] = {"model.position": "alibi"}
LATENT: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "model.kv_heads"},
    "model.kv_rank": 12,
    "model.q_rank": 10,
    "model.rope_head_dim": 4,
    "model.nope_head_dim": 6,
    "model.value_head_dim": 5,
}
AHEAD: dict[str, Any] = {"model.mtp_depth": 2, "loss.mtp": 0.5}
CUT: dict[str, Any] = {"model.layers": 3}
"""Two or four data ranks cut what lies flat within a layer; four layers they would cut between them."""
OFFLOAD2: dict[str, Any] = {"zero.stage": 2, "zero.config": "zero2-offload"}
OFFLOAD3: dict[str, Any] = {"zero.stage": 3, "zero.config": "zero3-offload"}


OVERLAP: dict[str, Any] = {"overlap.gradients": True}
SMALLER: dict[str, Any] = {"overlap.tensor_chunks": 3}
UNHURRIED: dict[str, Any] = {"overlap.messages": False}


def zero(stage: int) -> dict[str, Any]:
    """Return the overrides of a ZeRO stage."""
    return {"zero.stage": stage}


def schedule(kind: str, virtual_stages: int = 1) -> dict[str, Any]:
    """Return the overrides of a pipeline schedule, with so many chunks a stage where it leaves that open."""
    chunks = {"parallel.virtual_stages": virtual_stages} if virtual_stages > 1 else {}
    return {"parallel.schedule": kind, **chunks}


def batch(global_batch: int, micro_batch: int) -> dict[str, Any]:
    """Return the overrides of another accumulation depth."""
    return {"train.global_batch": global_batch, "train.micro_batch": micro_batch}


def expert(ranks: int) -> dict[str, Any]:
    """Return the overrides of experts that so many ranks divide."""
    return {"parallel.expert": ranks}


def partition(*layers: int) -> dict[str, Any]:
    """Return the overrides of an uneven partition."""
    return {"parallel.partition": list(layers)}


# (pipeline, data, tensor, overrides). The vocabulary is prime, so it divides by no tensor size but 1.
REPRESENTATIVE: tuple[Case, ...] = (
    Case(1, 1, 1),
    Case(1, 4, 1, {**zero(3), **UNTIED}),
    Case(1, 1, 2, {**LLAMA, **SEQUENCE, **RECOMPUTE, **DROPOUT}),
    Case(3, 1, 1, {**partition(2, 1, 1), **DROPOUT}),
    Case(1, 2, 2, {**zero(3), **SEQUENCE}),
    Case(4, 2, 1, {**zero(2), **DROPOUT, **SMOOTHING}),
    Case(2, 2, 2, {**zero(1), **SEQUENCE}),
    Case(2, 2, 2, {**SEQUENCE, **DROPOUT, **GPIPE, **batch(16, 2)}),
    Case(1, 2, 2, {**FUSED_HEAD, **zero(3)}),
    Case(2, 1, 2, {**UNFUSED_ATTENTION, **LLAMA, **DROPOUT}),
    Case(1, 3, 1, {**PAD, **DROPOUT}),
    Case(1, 4, 2, {**MUON, **CUT, **LLAMA, **zero(2), **batch(8, 1)}),
    Case(4, 1, 1, {**schedule("interleaved", 2), "model.layers": 10, **partition(1, 2, 1, 1, 1, 1, 2, 1)}),
    Case(2, 1, 2, {**schedule("zb-h2"), **LLAMA, **SEQUENCE, **batch(12, 2)}),
    Case(2, 2, 2, {**schedule("zb-v"), **zero(2), **DROPOUT, **SMOOTHING}),
    Case(1, 1, 1, {**RING, **WINDOWS, **PACKED}),
    Case(2, 1, 2, {**RING, **schedule("zb-v"), **ALIBI, **PACKED, **zero(2)}),
    Case(1, 2, 2, {**ULYSSES, "model.kv_heads": 1, "model.position": "t5", **zero(3)}),
    Case(2, 2, 2, {**LATENT, **zero(2), **MUON, **RECOMPUTE}),
    Case(2, 1, 2, {**AHEAD, **UNTIED, **SEQUENCE, **DROPOUT}),
    Case(1, 4, 1, {**FULL, **LLAMA, **expert(2), **zero(1), **batch(8, 1)}),
    Case(1, 2, 2, {**BALANCED, **expert(2), **SEQUENCE, **DROPOUT}),
    Case(1, 1, 2, {**FULL, **RING, **expert(2), **SEQUENCE, **DROPOUT}),
    Case(2, 2, 2, {**OVERLAP, **SMALLER, **schedule("zb-v"), **SEQUENCE, **DROPOUT, **RECOMPUTE}),
    Case(1, 2, 2, {**OVERLAP, **SMALLER, **LLAMA, **zero(2), **SELECTIVE}),
)
"""Those that every test run checks: each feature at least once."""

CASES: tuple[Case, ...] = (
    *REPRESENTATIVE,
    Case(1, 1, 1, {**LLAMA, **DROPOUT, **SMOOTHING, **zero(1)}),
    Case(1, 2, 1),
    Case(1, 4, 1, {**zero(1), **batch(8, 1)}),
    Case(1, 2, 1, {**zero(2), **DROPOUT}),
    Case(1, 2, 1, {**OFFLOAD2}),
    Case(1, 2, 1, {**OFFLOAD3}),
    Case(1, 1, 2),
    Case(1, 1, 4, {**DROPOUT, **SMOOTHING}),
    Case(1, 1, 2, {**SEQUENCE, **DROPOUT}),
    Case(2, 1, 1, GPIPE),
    Case(2, 1, 1, {**UNTIED, **batch(8, 8)}),
    Case(4, 1, 1, {**GPIPE, **LLAMA}),
    Case(4, 1, 1, {**batch(12, 2), **zero(1)}),
    Case(1, 2, 2, {**zero(3), **LLAMA, **DROPOUT}),
    Case(1, 2, 4, {**zero(2), **SEQUENCE, **DROPOUT}),
    Case(1, 4, 2, {**zero(1), **LLAMA, "model.kv_heads": 4}),
    Case(2, 2, 1, {**zero(2), **GPIPE}),
    Case(2, 4, 1, {**zero(1), **DROPOUT}),
    Case(2, 2, 1, OFFLOAD2),
    Case(2, 1, 2, OFFLOAD2),
    Case(2, 1, 2, {**SEQUENCE, **RECOMPUTE}),
    Case(2, 1, 4, {**zero(1), **SEQUENCE, **DROPOUT}),
    Case(3, 1, 2, {**partition(1, 1, 2), **LLAMA, **GPIPE, **SEQUENCE}),
    Case(4, 1, 2, {**zero(1), **LLAMA}),
    Case(2, 2, 2, {**zero(2), **DROPOUT, **SMOOTHING}),
    Case(1, 1, 4, {**FUSED_HEAD, **SEQUENCE, **SMOOTHING}),
    Case(1, 2, 1, {**OUR_ADAMW, **zero(2)}),
    Case(2, 3, 1, {**PAD, **zero(2), **batch(7, 2)}),
    Case(1, 4, 2, {**PAD, **zero(1), **SEQUENCE, **batch(5, 2)}),
    Case(1, 3, 1, {**PAD, **zero(3), **batch(7, 1)}),
    Case(2, 2, 2, {**MUON, **CUT, **partition(2, 1), "model.kv_heads": 1}),
    Case(1, 2, 1, {**MUON, **CUT, **OFFLOAD2}),
    Case(4, 1, 2, {**schedule("interleaved", 2), **EIGHT, **SEQUENCE, **RECOMPUTE, **DROPOUT}),
    Case(2, 2, 2, {**schedule("interleaved", 2), **zero(2), **UNTIED, **batch(12, 2)}),
    Case(4, 2, 1, {**schedule("breadth-first", 2), **EIGHT, **zero(1), **DROPOUT}),
    Case(2, 1, 2, {**schedule("breadth-first", 2), **LLAMA, **SEQUENCE, **SELECTIVE}),
    Case(4, 1, 2, {**schedule("zb-h1"), **SEQUENCE, **RECOMPUTE, **DROPOUT}),
    Case(2, 2, 2, {**schedule("zb-h1"), **zero(2), **UNTIED, **DROPOUT}),
    Case(4, 2, 1, {**schedule("zb-h2"), **zero(1), **SELECTIVE, **DROPOUT}),
    Case(4, 1, 2, {**schedule("zb-v"), **EIGHT, **SEQUENCE, **RECOMPUTE, **DROPOUT}),
    Case(2, 2, 1, {**schedule("zb-v"), **OFFLOAD2}),
    Case(4, 2, 1, {**schedule("dualpipe-v"), **EIGHT, **UNTIED, **zero(1), **DROPOUT}),
    Case(2, 2, 2, {**schedule("dualpipe-v"), **SEQUENCE, **zero(2), **SELECTIVE}),
    Case(1, 2, 2, {**RING, **LLAMA, **zero(1)}),
    Case(1, 1, 2, {**RING_OF_FOUR, **DROPOUT, **SEQUENCE, "model.sequence": 32}),
    Case(1, 2, 2, {**RING, **zero(3), **DROPOUT, **RECOMPUTE}),
    Case(4, 1, 1, {**RING, **schedule("interleaved", 2), **EIGHT, **WINDOWS, **DROPOUT, **SELECTIVE}),
    Case(1, 2, 1, {**RING_OF_FOUR, **MUON, **CUT, **LLAMA, **zero(2)}),
    Case(1, 3, 1, {**RING, **PAD, **zero(1), "data.rows": "documents", **batch(7, 1)}),
    Case(1, 2, 1, {**ULYSSES, **PACKED, **WINDOWS, **zero(2)}),
    Case(2, 1, 2, {**ULYSSES, **DROPOUT, **SEQUENCE, "model.kv_heads": 2}),
    Case(1, 2, 4, {**LATENT, **SEQUENCE, **DROPOUT, **zero(3)}),
    Case(4, 1, 2, {**LATENT, **schedule("zb-v"), **EIGHT, **SEQUENCE, **SELECTIVE}),
    Case(2, 1, 4, {**schedule("interleaved", 2), "model.kv_rank": 12, **DROPOUT}),
    Case(1, 2, 2, {**AHEAD, **LATENT, **SEQUENCE, **zero(3)}),
    Case(4, 1, 2, {**AHEAD, **schedule("zb-h1"), **FUSED_HEAD, **RECOMPUTE}),
    Case(2, 2, 2, {**AHEAD, **schedule("interleaved", 2), **UNTIED, **MUON, **zero(2)}),
    Case(1, 1, 4, {**FULL, **LLAMA, **SEQUENCE, "model.kv_heads": 4}),
    Case(1, 2, 1, {**BALANCED, **zero(3)}),
    Case(1, 4, 1, {**EXPERTS, **expert(4), **batch(8, 1)}),
    Case(2, 2, 1, {**FULL, **expert(2), **schedule("zb-v"), **RECOMPUTE}),
    Case(2, 2, 2, {**BALANCED, **expert(2), **zero(2), **SEQUENCE}),
    Case(2, 2, 1, {**EXPERTS, **expert(2), **OFFLOAD2}),
    Case(1, 2, 2, {**BALANCED, **RING, **expert(2), **SEQUENCE, **zero(2)}),
    Case(1, 2, 1, {**EXPERTS, **ULYSSES, **expert(4), **zero(1)}),
    Case(2, 1, 2, {**EXPERTS, **AHEAD, **RING, **expert(2), **schedule("zb-v")}),
    Case(2, 2, 2, {**OVERLAP, **SMALLER, **UNHURRIED, **schedule("interleaved", 2), "model.kv_heads": 1}),
    Case(1, 4, 1, {**OVERLAP, **FULL, **expert(2), **LLAMA, **batch(16, 1)}),
    Case(1, 2, 2, {**OVERLAP, **SMALLER, **SEQUENCE, **zero(3)}),
    Case(4, 2, 1, {**OVERLAP, **UNHURRIED, **schedule("zb-h1"), **UNTIED, **batch(12, 2)}),
)

SGD: dict[str, Any] = {"optim.kind": "sgd", "optim.lr": 0.1, "optim.momentum": 0.5}
OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": {}, "sgd": SGD}

GRADIENT_LIMITS = {"fp64": 1e-12, "fp32": 1e-5}
"""Step-1 gradient of each parameter, L2 of the difference over its norm: some thousand roundings of each dtype."""
LOSS_LIMIT = 1e-6
NORM_LIMIT = 1e-5
"""Over all steps. DeepSpeed takes its gradient norm in fp32, also under fp64."""


def misses(difference: Difference, precision: str) -> list[str]:
    """Return what exceeds its limit, as text; nothing where the layout agrees with the reference."""
    checks = (
        (f"gradient of {difference.worst_parameter}", difference.gradient, GRADIENT_LIMITS[precision]),
        ("loss", difference.loss, LOSS_LIMIT),
        ("gradient norm", difference.norm, NORM_LIMIT),
    )
    return [f"{name} off by {value:.1e}, limit {limit:.0e}" for name, value, limit in checks if not value <= limit]
