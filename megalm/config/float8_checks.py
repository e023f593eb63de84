"""Rules between a recipe's keys about products in fp8. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig

MULTIPLE = 16
"""Of which the dims of a product in fp8 must be multiples: one of 16 bytes is what a GPU loads at a time."""


@rule("train.fp8", "precision", "run.device", "zero.stage", "model.experts")
def _fp8_has_its_place(config: RunConfig) -> Iterator[str]:
    fp8 = config.train.fp8
    if fp8 == "none":
        return
    for key, value, excluded, reason in (
        (
            "precision", config.precision, config.precision != "bf16",
            "does not go with it: what is not rounded to fp8 is in bf16; use precision=bf16",
        ),
        (
            "run.device", config.run.device, config.run.device == "cpu",
            "has no products in fp8; use a GPU that has them",
        ),
        (
            "zero.stage", config.zero.stage, config.zero.stage == 3,
            "does not go with it: DeepSpeed's own linear layer, which lets go of gathered weights between forward and "
            "backward, multiplies in bf16; use zero.stage 0, 1 or 2",
        ),
        (
            "model.experts", config.model.experts, config.model.experts is not None,
            "does not go with it: the products of experts, most of the work, have no fp8 kernel here; use "
            "model.experts=null",
        ),
    ):  # fmt: skip
        if excluded:
            yield f"train.fp8={fp8}: {key}={value} {reason}, or train.fp8=none"


@rule(
    *("train.fp8", "parallel.tensor", "model.hidden", "model.heads", "model.head_dim", "model.kv_heads", "model.ffn"),
    *("model.activation", "model.attention_gate", "model.kv_rank", "model.q_rank", "model.rope_head_dim"),
    *("model.nope_head_dim", "model.value_head_dim"),
)
def _features_are_whole_loads(config: RunConfig) -> Iterator[str]:
    if config.train.fp8 == "none":
        return
    odd = [f"{what}={count}" for what, count in features(config).items() if count % MULTIPLE]
    if odd:
        tensor = config.parallel.tensor
        share = f", divided over parallel.tensor={tensor}," if tensor > 1 else ""
        yield (
            f"train.fp8={config.train.fp8} multiplies matrices whose dims are multiples of {MULTIPLE}, and these"
            f"{share} are not: {', '.join(odd)}; use other sizes, or train.fp8=none"
        )


@rule(
    *("train.fp8", "train.micro_batch", "model.sequence", "model.kv_rank"),
    *("parallel.context", "parallel.tensor", "parallel.sequence", "overlap.tensor_chunks"),
)
def _tokens_are_whole_loads(config: RunConfig) -> Iterator[str]:
    if config.train.fp8 in ("none", "rowwise_with_gw_hp"):
        return
    parallel, chunks = config.parallel, config.overlap.tensor_chunks
    tokens = config.train.micro_batch * config.model.sequence // parallel.context
    ranks = parallel.tensor if parallel.sequence else 1
    cuts = {"": tokens}
    if config.model.is_latent and ranks > 1:
        cuts[", of which latents' projections take a tensor rank's own,"] = tokens // ranks
    if parallel.tensor > 1 and chunks > 1:
        even = tokens % (ranks * chunks) == 0  # each rank cuts its own tokens
        cuts[f", in {chunks} chunks (overlap.tensor_chunks),"] = tokens // chunks if even else 1
    for how, count in cuts.items():
        if count % MULTIPLE:
            yield (
                f"train.fp8={config.train.fp8} multiplies matrices whose dims are multiples of {MULTIPLE}, and a "
                f"rank's {tokens} tokens of a microbatch{how or ','} over which weights' gradients are summed, are "
                "not; use another train.micro_batch or model.sequence"
                f"{', or overlap.tensor_chunks=1' if 'chunks' in how else ''}, or train.fp8=rowwise_with_gw_hp"
            )


def features(config: RunConfig) -> dict[str, int]:
    """Return the dims, but tokens, of a tensor rank's products in a block, by name."""
    model, tensor = config.model, config.parallel.tensor

    def part(whole: int) -> int:
        return -(-whole // tensor)

    ffn = part(model.feed_forward)
    found = {
        "model.hidden": model.hidden,
        "the heads' values": part(model.heads * model.value_size),
        "mlp.up": ffn * (2 if model.has_gated_activation else 1),
        "mlp.down": ffn,
    }
    if model.kv_rank is not None:
        found["queries"] = part(model.heads * model.head_size)
        found["model.kv_rank"] = model.kv_rank
        found["kv_down"] = model.kv_rank + model.rope_size
        found["kv_up"] = part(model.heads * (model.nope_size + model.value_size))
        return found if model.q_rank is None else found | {"model.q_rank": model.q_rank}
    shared = 2 * model.head_size
    if model.key_value_heads == 1 and model.heads > 1:
        return found | {"queries": part(model.projected_width - shared), "key and value": shared}
    return found | {"queries, keys and values": part(model.projected_width)}
