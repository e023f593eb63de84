"""The rules between the keys of a recipe: what must divide what, and what excludes what.

Each rule names the keys it reads, so that a recipe with one wrong key still has every other rule checked.
Messages give the values and the legal ones; the last key named is the one to which the listed values apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from megalm.config.idle_keys import USES, idle_keys
from megalm.errors import ConfigError

if TYPE_CHECKING:
    from megalm.config.run import RunConfig

Check = Callable[["RunConfig"], Iterator[str]]


class Rule(NamedTuple):
    """A check and the recipe keys that it reads."""

    keys: frozenset[str]
    check: Check


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Return a decorator that adds a check, which reads `keys`, to RULES."""

    def add(check: Check) -> Check:
        RULES.append(Rule(frozenset(keys), check))
        return check

    return add


def broken_rules(config: RunConfig, without: frozenset[str] = frozenset()) -> list[str]:
    """Return a line for each broken rule that reads none of the keys in `without` (already wrong)."""
    return [problem for rule in RULES if not rule.keys & without for problem in rule.check(config)]


def report(problems: list[str], source: str = "recipe") -> str:
    """Return the message for mistakes: one alone is the whole line; of several, the first says how many."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{source}: {len(problems)} mistakes", *(f"  {problem}" for problem in problems)])


def divisors(number: int) -> list[int]:
    """Return every positive divisor of `number` in ascending order."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})


def list_values(values: list[int], most: int = 12) -> str:
    """Return `1, 2, 3 or 4`; of a long list the first `most` and the last."""
    if len(values) == 1:
        return str(values[0])
    shown = [str(value) for value in (values if len(values) <= most + 1 else values[:most])]
    if len(values) > most + 1:
        shown[-1] += ", ..."
        return f"{', '.join(shown)} or {values[-1]}"
    return f"{', '.join(shown[:-1])} or {shown[-1]}"


def not_divisible(whole_name: str, whole: int, part_name: str, part: int) -> str:
    """Return the line that says so, with the values that `part_name` may take."""
    return f"{whole_name}={whole} is not divisible by {part_name}={part}; use {list_values(divisors(whole))}"


def _feed_forward_name(config: RunConfig) -> str:
    return "model.ffn" if config.model.ffn is not None else "the derived model.ffn"


@rule("model.hidden", "model.heads", "model.head_dim", "model.kv_rank", "model.nope_head_dim")
def _heads_divide_hidden(config: RunConfig) -> Iterator[str]:
    derived = config.model.nope_head_dim is None if config.model.is_latent else config.model.head_dim is None
    if derived and config.model.hidden % config.model.heads:
        yield not_divisible("model.hidden", config.model.hidden, "model.heads", config.model.heads)


@rule("model.heads", "model.kv_heads")
def _kv_heads_divide_heads(config: RunConfig) -> Iterator[str]:
    if config.model.heads % config.model.key_value_heads:
        yield not_divisible("model.heads", config.model.heads, "model.kv_heads", config.model.key_value_heads)


@rule("model.heads", "parallel.tensor")
def _tensor_divides_heads(config: RunConfig) -> Iterator[str]:
    if config.model.heads % config.parallel.tensor:
        yield not_divisible("model.heads", config.model.heads, "parallel.tensor", config.parallel.tensor)


@rule("model.kv_heads", "parallel.tensor")
def _tensor_divides_kv_heads(config: RunConfig) -> Iterator[str]:
    if config.model.key_value_heads > 1 and config.model.kv_heads and config.model.kv_heads % config.parallel.tensor:
        heads, tensor = config.model.kv_heads, config.parallel.tensor
        yield not_divisible("model.kv_heads", heads, "parallel.tensor", tensor)


@rule("model.ffn", "model.hidden", "model.activation", "parallel.tensor")
def _tensor_divides_feed_forward(config: RunConfig) -> Iterator[str]:
    width = config.model.feed_forward
    if not config.model.has_dense_mlps:
        return
    if width % config.parallel.tensor:
        yield not_divisible(_feed_forward_name(config), width, "parallel.tensor", config.parallel.tensor)


@rule("model.position", "model.hidden", "model.heads", "model.head_dim", "model.rotary_share", "model.kv_rank")
def _rotary_needs_pairs(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.position != "rotary" or model.is_latent or (model.head_dim is None and model.hidden % model.heads):
        return
    if model.rotary_size == 0:
        yield f"model.rotary_share={model.rotary_share} turns no pair of a head's {model.head_size} features; raise it"
    elif model.rotary_share == 1.0 and model.head_size % 2:
        even = [heads for heads in divisors(model.hidden) if model.hidden // heads % 2 == 0]
        remedy = f"use {list_values(even)}" if even else "make model.hidden even"
        if model.head_dim is not None:
            remedy = "make model.head_dim even"
        yield (
            f"model.position=rotary turns pairs of features, but a head has model.hidden/model.heads="
            f"{model.head_size} of them with model.heads={model.heads}; {remedy}"
        )


@rule(*USES)
def _no_key_is_idle(config: RunConfig) -> Iterator[str]:
    yield from idle_keys(config)


@rule("model.rotary_scaling", "model.rotary_factor", "model.rotary_original")
def _scaled_rotations_know_by_how_much(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.rotary_scaling != "none" and model.rotary_factor == 1.0:
        yield f"model.rotary_scaling={model.rotary_scaling} needs model.rotary_factor above 1: the growth of texts"
    if model.rotary_scaling in ("yarn", "llama3") and model.rotary_original is None:
        yield (
            f"model.rotary_scaling={model.rotary_scaling} needs model.rotary_original: the length of the texts "
            "on which the model was trained before"
        )


@rule("model.layers", "model.nope_every")
def _some_layers_know_positions(config: RunConfig) -> Iterator[str]:
    every, layers = config.model.nope_every, config.model.layers
    if every is not None and not 2 <= every <= layers:
        which = "every" if every == 1 else "no"
        yield f"model.nope_every={every} leaves positions out of {which} layer; use 2 to {layers}, or none at all"


@rule("model.relative_buckets", "model.relative_distance", "model.position")
def _relative_buckets_are_enough(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.position == "t5" and model.relative_distance <= model.relative_buckets // 2:
        yield (
            f"model.relative_distance={model.relative_distance} is not above half of model.relative_buckets="
            f"{model.relative_buckets}, where each distance has a bucket; use more than {model.relative_buckets // 2}"
        )


@rule("model.norm_place", "model.parallel_residual")
def _parallel_halves_have_a_place(config: RunConfig) -> Iterator[str]:
    if config.model.parallel_residual and config.model.norm_place == "post":
        yield "model.parallel_residual=true needs model.norm_place pre or sandwich: one sum has one norm behind it"


@rule("model.mtp_depth", "model.sequence")
def _further_tokens_are_within_the_row(config: RunConfig) -> Iterator[str]:
    depth, length = config.model.mtp_depth, config.model.sequence
    if depth >= length:
        yield (
            f"model.mtp_depth={depth} predicts tokens that no row of model.sequence={length} has; "
            f"use less than {length}"
        )


@rule("model.document_mask", "model.dropout", "model.attention_dropout")
def _documents_exclude_dropped_probabilities(config: RunConfig) -> Iterator[str]:
    if config.model.document_mask and config.model.probability_dropout:
        yield (
            "model.document_mask=true excludes dropping attention probabilities, as packed rows have no mask of their "
            f"own; use model.attention_dropout=0.0 instead of {config.model.probability_dropout}"
        )


@rule("model.logit_softcap", "loss.fused_head")
def _fused_head_has_no_cap(config: RunConfig) -> Iterator[str]:
    if config.model.logit_softcap is not None and config.loss.fused_head:
        yield "model.logit_softcap acts on logits, which loss.fused_head=true never has; use loss.fused_head=false"


@rule("parallel.sequence", "model.sequence", "parallel.tensor")
def _tensor_divides_sequence(config: RunConfig) -> Iterator[str]:
    if config.parallel.sequence and config.model.sequence % config.parallel.tensor:
        length, tensor = config.model.sequence, config.parallel.tensor
        line = not_divisible("model.sequence", length, "parallel.tensor", tensor)
        yield f"{line}, or parallel.sequence=false"


@rule("train.global_batch", "train.micro_batch", "train.pad_batch", "batch_ramp.start", "batch_ramp.increment")
def _micro_batch_divides(config: RunConfig) -> Iterator[str]:
    part = config.train.micro_batch
    for name, whole in _batches(config).items():
        if whole % part and not config.train.pad_batch:
            yield not_divisible(name, whole, "train.micro_batch", part)


def _batches(config: RunConfig) -> dict[str, int]:
    """Return by key what every step's global batch is made of."""
    ramp = {"batch_ramp.start": config.batch_ramp.start, "batch_ramp.increment": config.batch_ramp.increment}
    return {"train.global_batch": config.train.global_batch, **{key: n for key, n in ramp.items() if n is not None}}


@rule("train.recompute_every", "model.layers")
def _recomputed_blocks_exist(config: RunConfig) -> Iterator[str]:
    every, layers = config.train.recompute_every, config.model.layers
    if every > layers:
        yield f"train.recompute_every={every} is more than model.layers={layers}; use at most {layers}"


@rule("loss_scale.initial", "loss_scale.minimum")
def _loss_scale_starts_above_its_minimum(config: RunConfig) -> Iterator[str]:
    scale = config.loss_scale
    if scale.initial < scale.minimum:
        least = f"{scale.minimum:g}"
        yield f"loss_scale.initial={scale.initial:g} is below loss_scale.minimum={least}; use {least} or more"


@rule("train.reduce_dtype", "precision")
def _doubles_are_reduced_as_they_are(config: RunConfig) -> Iterator[str]:
    if config.precision == "fp64" and config.train.reduce_dtype is not None:
        yield f"train.reduce_dtype={config.train.reduce_dtype} would round what precision=fp64 checks; leave it out"


def check_world(config: RunConfig, world_size: int) -> int:
    """Return world_size / (tensor x pipeline x context), the size of the data axis.

    Raises ConfigError when the ranks do not make whole copies of the model, the batch does not divide over the
    copies, or a rank that is to be profiled is none of them.
    """
    parallel, ranks = config.parallel, config.parallel.ranks
    copies = world_size // ranks
    layout = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}"
    if parallel.context > 1:
        layout += f" x parallel.context={parallel.context}"
    if world_size < ranks:
        raise ConfigError(
            f"{layout} needs {ranks} ranks, but {world_size} {'is' if world_size == 1 else 'are'} started; "
            f"start {ranks} or a multiple of it, or make one of these smaller"
        )
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks are not divisible by {layout}, {ranks} ranks a copy of the model; "
            f"start {copies * ranks} or {(copies + 1) * ranks}"
        )
    replicas = copies * parallel.context
    if replicas % parallel.expert:
        raise ConfigError(
            f"parallel.expert={parallel.expert} does not divide the {replicas} ranks that hold the same layers "
            f"({world_size} / {ranks // parallel.context}); use {list_values(divisors(replicas))}, or start a multiple "
            f"of {parallel.least_ranks} ranks"
        )
    part = config.train.micro_batch
    each = part * copies
    for key, whole in _batches(config).items():
        if whole % each and not config.train.pad_batch:
            lower, upper = whole // each * each, (whole // each + 1) * each
            batches = f"{lower} or {upper}" if lower else f"{upper}"
            sizes = divisors(math.gcd(*_batches(config).values()) // part)
            fitting = [ranks * size for size in sizes if size * parallel.context % parallel.expert == 0]
            worlds = f"or {list_values(fitting)} ranks, " if fitting else ""
            raise ConfigError(
                f"{key}={whole} is not divisible by train.micro_batch={part} x {copies} "
                f"data-parallel ranks ({world_size} ranks / {ranks}); use {batches} for {key}, {worlds}or "
                "train.pad_batch=true, which leaves some rows without work"
            )
    absent = [rank for rank in config.profile.ranks or () if rank >= world_size]
    if absent and (config.profile.start or config.profile.memory_at):
        last = "0" if world_size == 1 else f"0 to {world_size - 1}"
        raise ConfigError(
            f"profile.ranks={list(config.profile.ranks or ())}: no rank {absent[0]} is started; use {last}"
        )
    return copies
