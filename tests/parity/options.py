"""A covering array over the options of a recipe and the layouts: each two values meet in some case, where they may."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import combinations, product
from typing import Any

from allpairspy import AllPairs

from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.models.build import stage_plan
from tests.parity.harness import Case

STEPS = 3
"""Enough for every gradient, and for the updates that follow from the first two."""
Value = dict[str, Any]
NONE: Value = {}


def one(key: str, *values: Any) -> list[Value]:
    """Return a factor of one key: its default, then each of the values."""
    return [NONE, *({key: value} for value in values)]


ROTARY: Value = {"model.position": "rotary"}
SCALED: Value = {**ROTARY, "model.rotary_factor": 4.0}
STRIDED: Value = {"model.attention_pattern": "strided", "model.block_size": 2, "model.local_blocks": 2}
HIERARCHICAL: Value = {**STRIDED, "model.attention_pattern": "hierarchical"}
LATENT: Value = {
    "model.kv_rank": 10,
    "model.q_rank": 9,
    "model.rope_head_dim": 4,
    "model.nope_head_dim": 7,
    "model.value_head_dim": 5,
}
ORIGINAL: Value = {
    "optim.muon_adjust_lr_fn": "original",
    "optim.lr": 0.02,
    "optim.adamw_lr": 1e-3,
    "optim.muon_nesterov": False,
    "optim.muon_momentum": 0.8,
}
EXPERTS: Value = {"model.experts": 4, "model.expert_ffn": 16, "loss.load_balance": 0.05, "loss.router_z": 0.01}
FULL: Value = {**EXPERTS, "model.capacity_factor": 0.8}
BALANCED: Value = {
    **EXPERTS,
    "model.experts": 6,
    "model.experts_per_token": 3,
    "model.router_score": "sigmoid",
    "model.router_bias_rate": 0.01,
    "model.shared_experts": 1,
    "model.dense_layers": 1,
}
LAYOUT = "layout"
FACTORS: dict[str, list[Any]] = {
    LAYOUT: [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (2, 2, 2)],
    "position": [
        NONE,
        *({"model.position": kind} for kind in ("none", "sinusoidal", "alibi")),
        {"model.position": "t5", "model.relative_buckets": 8, "model.relative_distance": 12},
        ROTARY,
        {**ROTARY, "model.rotary_share": 0.5},
        {**SCALED, "model.rotary_scaling": "linear"},
        {**SCALED, "model.rotary_scaling": "ntk"},
        {**SCALED, "model.rotary_scaling": "yarn", "model.rotary_original": 64},
        {**SCALED, "model.rotary_scaling": "llama3", "model.rotary_original": 64},
    ],
    "activation": one("model.activation", "relu", "relu2", "gelu_erf", "silu", "geglu", "swiglu"),
    "heads": [
        NONE,
        {"model.kv_heads": 2},
        {"model.kv_heads": 1},
        {"model.kv_heads": 1, "model.head_dim": 12},
        {"model.kv_rank": 12},
        LATENT,
    ],
    "window": [NONE, {"model.window": 3}, {"model.window": 5, "model.window_pattern": "SSL"}],
    "pattern": [
        NONE,
        {**STRIDED, "model.block_stride": 3},
        {**STRIDED, "model.block_size": 4, "model.global_tokens": 3},
        HIERARCHICAL,
        {**HIERARCHICAL, "model.block_size": 4, "model.local_blocks": 1},
    ],
    "norm place": one("model.norm_place", "post", "sandwich"),
    "norm": one("model.norm", "rmsnorm", "rmsnorm_zero_centered"),
    "parallel": one("model.parallel_residual", True),
    "experts": [
        NONE,
        EXPERTS,
        FULL,
        {**EXPERTS, "model.experts_per_token": 1, "model.expert_ffn": 32},
        BALANCED,
        {**EXPERTS, "parallel.expert": 2},
        {**BALANCED, **FULL, "parallel.expert": 2},
    ],
    "bias": [NONE, {"model.bias": False}, {"model.bias": False, "model.qkv_bias": True}, {"model.out_bias": False}],
    "dropout": [
        NONE,
        {"model.dropout": 0.1},
        {"model.dropout": 0.1, "model.attention_dropout": 0.0},
        {"model.attention_dropout": 0.2},
    ],
    "depth": one("model.stochastic_depth", 0.4),
    "nope": one("model.nope_every", 2),
    "documents": [NONE, {"model.document_mask": True}, {"data.rows": "documents"}],
    "qk_norm": one("model.qk_norm", True),
    "score scale": one("model.scores_head_dim", 7),
    "caps": [NONE, {"model.attention_softcap": 3.0, "model.logit_softcap": 4.0}],
    "sinks": one("model.attention_sinks", True),
    "gate": one("model.attention_gate", True),
    "embedding": [NONE, {"model.embedding_norm": True, "model.embedding_scale": 2.5}],
    "residual": one("model.residual_scale", 0.7),
    "init": [*one("model.init", "truncated_normal", "xavier", "he"), {"model.init_depth_scaled": False}],
    "mup": [NONE, {"model.mup_base": 8}, {"model.mup_base": 64, "model.mup_base_head_dim": 2}],
    "mtp": [NONE, {"model.mtp_depth": 1}, {"model.mtp_depth": 2, "loss.mtp": 0.5}],
    "tied": one("model.tie_embeddings", False),
    "attention": one("model.flash_attention", False),
    "sequence": one("parallel.sequence", True),
    "context": [
        NONE,
        {"parallel.context": 2},
        {"parallel.context": 2, "parallel.context_attention": "ulysses"},
    ],
    "schedule": [
        *one("parallel.schedule", "gpipe", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"),
        {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2},
        {"parallel.schedule": "breadth-first", "parallel.virtual_stages": 2},
    ],
    "zero": one("zero.stage", 1, 2, 3),
    "overlap": [
        NONE,
        {"overlap.gradients": True},
        {"overlap.tensor_chunks": 2},
        {"overlap.gradients": True, "overlap.tensor_chunks": 3},
        {"overlap.messages": False},
    ],
    "recompute": [
        NONE,
        {"train.recompute": "full"},
        {"train.recompute": "full", "train.recompute_every": 2},
        {"train.recompute": "selective"},
    ],
    "loss": [
        NONE,
        {"loss.fused_head": True, "loss.z_loss": 0.02},
        {"loss.label_smoothing": 0.1, "loss.z_loss": 0.01},
    ],
    "padding": [NONE, {"train.pad_batch": True, "train.global_batch": 7}],
    "growth": [
        NONE,
        {"batch_ramp.start": 4, "batch_ramp.every": 1},
        {"sequence_warmup.start": 4, "sequence_warmup.every": 1},
    ],
    "optimizer": [
        NONE,
        {"optim.kind": "adam"},
        {"optim.kind": "lion", "optim.lr": 1e-4},
        {"optim.kind": "sgd", "optim.momentum": 0.5, "optim.nesterov": True, "optim.lr": 0.1},
        {"optim.kind": "rmsprop", "optim.momentum": 0.5, "optim.eps": 1e-4},
        {"optim.kind": "adagrad"},
        {"optim.kind": "adafactor"},
        {"optim.kind": "muon"},
        {"optim.kind": "muon", **ORIGINAL},
    ],
    "rules": [
        NONE,
        {
            "optim.rules": [
                {"match": "embedding.*", "lr": 0.3},
                {"match": "*.qkv.*", "lr": 2.0, "weight_decay": 0.3},
                {"match": "blocks.1.*", "lr": 0.0},
            ]
        },
        {"optim.rules": [{"match": "blocks.[12].*", "freeze": True}, {"match": "embedding.weight", "freeze": True}]},
    ],
    "gradients": [
        NONE,
        {"optim.centralize": True},
        {"train.clip_grad_value": 0.002},
        {"optim.centralize": True, "train.clip_grad_value": 0.001, "train.clip_grad_norm": None},
    ],
    "offload": one("train.offload_activations", True),
}


def case_of(row: Sequence[Any]) -> Case:
    """Return the case of a value for each of the first factors."""
    chosen = dict(zip(FACTORS, row, strict=False))
    overrides: Value = {}
    for name, value in chosen.items():
        if name != LAYOUT:
            overrides |= value
    return Case(*chosen[LAYOUT], overrides)


def may_be(row: Sequence[Any]) -> bool:
    """Return whether a recipe may have these values together."""
    case = case_of(row)
    try:
        config, world = case.config(), case.layout.world_size
    except ConfigError:
        return False
    if world > 8:
        return False
    return config.zero.stage == 0 or all(
        any(not _is_frozen(config, layer) for layer in stage_plan(config, stage).layers)
        for stage in range(config.parallel.pipeline)
    )  # a run is refused where ZeRO has nothing to divide


def _is_frozen(config: RunConfig, layer: int) -> bool:
    return any(rule.freeze and fnmatch(f"blocks.{layer}.", rule.match) for rule in config.optim.rules)


@functools.cache
def _rows() -> list[list[Any]]:
    rows = [list(row) for row in AllPairs(list(FACTORS.values()), filter_func=may_be)]
    return [*rows, *map(only, _joined(missing_pairs(rows)))]


def _joined(pairs: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return few choices in which the pairs stand: each joins the first that it may, or is one by itself."""
    choices: list[dict[str, Any]] = []
    for pair in pairs:
        for choice in choices:
            agrees = all(choice.get(name, value) == value for name, value in pair.items())
            if agrees and may_be(only(choice | pair)):
                choice |= pair
                break
        else:
            choices.append(pair)
    return choices


def covering_array() -> tuple[Case, ...]:
    """Return the cases, the same each time."""
    return tuple(case_of(row) for row in _rows())


def only(pair: dict[str, Any]) -> list[Any]:
    """Return a row of defaults but for some factors."""
    return [pair.get(name, values[0]) for name, values in FACTORS.items()]


def missing_pairs(rows: Sequence[Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the pairs of values that meet in none of the rows, though they may."""
    for (place, first), (other, second) in combinations(enumerate(FACTORS), 2):
        for pair in product(FACTORS[first], FACTORS[second]):
            met = any((row[place], row[other]) == pair for row in rows)
            values = {first: pair[0], second: pair[1]}
            if not met and may_be(only(values)):
                yield values


@functools.cache
def each_value_once() -> tuple[Case, ...]:
    """Return few cases of the covering array in which each value stands at least once."""
    left = {(name, str(value)) for name, values in FACTORS.items() for value in values}
    chosen: list[Sequence[Any]] = []
    while left:
        best = max(_rows(), key=lambda row: len(left & _values(row)))
        chosen.append(best)
        left -= _values(best)
    return tuple(case_of(row) for row in chosen)


def _values(row: Sequence[Any]) -> set[tuple[str, str]]:
    return {(name, str(value)) for name, value in zip(FACTORS, row, strict=True)}
