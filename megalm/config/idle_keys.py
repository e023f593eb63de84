"""Keys that a recipe sets and that have no effect beside its other keys: each with the condition under which it has.

A rule of `checks` refuses them, as whoever sets them believes otherwise. `model.rotary_base` is not among them, so that
a recipe of rotary positions may be tried with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


class Use(NamedTuple):
    """What makes a key count, in words and as a condition."""

    condition: str
    holds: Callable[[RunConfig], bool]


def _when(section: str, key: str, *values: Any) -> Use:
    """Return the use of a key beside one of some values of another."""
    shown = " or ".join(str(value) for value in values)
    return Use(f"{section}.{key}={shown}", lambda config: getattr(getattr(config, section), key) in values)


_SCALED = Use("model.rotary_scaling", lambda config: config.model.rotary_scaling != "none")
_LATENT = Use("model.kv_rank", lambda config: config.model.is_latent)
_FP16 = Use("precision=fp16", lambda config: config.precision == "fp16")
_PROFILED = Use("profile.start", lambda config: config.profile.start is not None)
_SAVED = Use("checkpoint.every", lambda config: config.checkpoint.every > 0)
_EXPERTS = Use("model.experts", lambda config: config.model.experts is not None)
USES: dict[str, Use] = {
    "model.q_rank": _LATENT,
    "model.rope_head_dim": _LATENT,
    "model.nope_head_dim": _LATENT,
    "model.value_head_dim": _LATENT,
    "model.ffn": Use("a layer without experts, or model.expert_ffn=null", lambda config: config.model.has_dense_mlps),
    "model.rotary_share": _when("model", "position", "rotary"),
    "model.rotary_scaling": _when("model", "position", "rotary"),
    "model.rotary_factor": _SCALED,
    "model.rotary_original": _when("model", "rotary_scaling", "yarn", "llama3"),
    "model.relative_buckets": _when("model", "position", "t5"),
    "model.relative_distance": _when("model", "position", "t5"),
    "model.nope_every": _when("model", "position", "rotary", "alibi", "t5"),
    "model.window_pattern": Use("model.window", lambda config: config.model.window is not None),
    "model.window": Use("an S in model.window_pattern", lambda config: "S" in config.model.window_pattern),
    "model.block_size": _when("model", "attention_pattern", "strided", "hierarchical"),
    "model.local_blocks": _when("model", "attention_pattern", "strided", "hierarchical"),
    "model.block_stride": _when("model", "attention_pattern", "strided"),
    "model.global_tokens": _when("model", "attention_pattern", "strided"),
    "model.document_mask": _when("data", "rows", "stream"),
    "model.experts_per_token": _EXPERTS,
    "model.expert_ffn": _EXPERTS,
    "model.shared_experts": _EXPERTS,
    "model.dense_layers": _EXPERTS,
    "model.capacity_factor": _EXPERTS,
    "model.router_score": _EXPERTS,
    "model.router_bias_rate": _EXPERTS,
    "loss.load_balance": _EXPERTS,
    "loss.router_z": _EXPERTS,
    "parallel.expert": _EXPERTS,
    "model.mup_base_head_dim": Use("model.mup_base", lambda config: config.model.mup_base is not None),
    "early_stop.patience": Use("early_stop.metric", lambda config: config.early_stop.metric is not None),
    "early_stop.min_delta": Use("early_stop.metric", lambda config: config.early_stop.metric is not None),
    "checkpoint.keep_every": _SAVED,
    "checkpoint.keep_best": _SAVED,
    "loss.mtp": Use("model.mtp_depth", lambda config: config.model.mtp_depth > 0),
    "batch_ramp.increment": Use("batch_ramp.start", lambda config: config.batch_ramp.start is not None),
    "batch_ramp.every": Use("batch_ramp.start", lambda config: config.batch_ramp.start is not None),
    "sequence_warmup.every": Use("sequence_warmup.start", lambda config: config.sequence_warmup.start is not None),
    "parallel.context_attention": Use("parallel.context above 1", lambda config: config.parallel.context > 1),
    "overlap.tensor_chunks": Use("parallel.tensor above 1", lambda config: config.parallel.tensor > 1),
    "overlap.messages": Use("parallel.pipeline above 1", lambda config: config.parallel.pipeline > 1),
    "parallel.virtual_stages": _when("parallel", "schedule", "interleaved", "breadth-first"),
    "train.recompute_every": _when("train", "recompute", "selective", "full"),
    "train.offload_activations": _when("run", "device", "cuda", "auto"),  # a CPU's are in the host's memory
    "optim.momentum": _when("optim", "kind", "sgd", "rmsprop"),
    "optim.nesterov": Use(
        "optim.kind=sgd and optim.momentum", lambda config: config.optim.kind == "sgd" and config.optim.momentum > 0
    ),
    "optim.alpha": _when("optim", "kind", "rmsprop"),
    "optim.muon_momentum": _when("optim", "kind", "muon"),
    "optim.muon_nesterov": _when("optim", "kind", "muon"),
    "optim.muon_ns_steps": _when("optim", "kind", "muon"),
    "optim.muon_adjust_lr_fn": _when("optim", "kind", "muon"),
    "optim.adamw_lr": _when("optim", "kind", "muon"),
    "loss_scale.initial": _FP16,
    "loss_scale.window": _FP16,
    "loss_scale.minimum": _FP16,
    "profile.steps": _PROFILED,
    "profile.ranks": Use(
        "profile.start or profile.memory_at",
        lambda config: config.profile.start is not None or config.profile.memory_at is not None,
    ),
    "profile.memory": _PROFILED,
    "lr_schedule.cycles": _when("lr_schedule", "kind", "cosine"),
    "lr_schedule.milestones": _when("lr_schedule", "kind", "step"),
    "lr_schedule.factor": _when("lr_schedule", "kind", "step"),
    "lr_schedule.cooldown_shape": Use(
        "lr_schedule.cooldown_steps", lambda config: config.lr_schedule.cooldown_steps > 0
    ),
}


def idle_keys(config: RunConfig) -> Iterator[str]:
    """Yield a line for each key that has another value than its default, and no effect."""
    for path, use in USES.items():
        section_name, key = path.split(".")
        section = getattr(config, section_name)
        value = getattr(section, key)
        if value != type(section).model_fields[key].get_default() and not use.holds(config):
            shown = str(value).lower() if isinstance(value, bool) else value
            shown = list(value) if isinstance(value, tuple) else shown
            yield f"{path}={shown} has no effect without {use.condition}; leave it out"
