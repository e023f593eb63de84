"""The rules between the keys of a recipe: what must divide what, and what excludes what.

Each rule names the keys it reads, so that a recipe with one wrong key still has every other rule checked.
Messages give the values and the legal ones; the last key named is the one to which the listed values apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from megalm.errors import ConfigError

if TYPE_CHECKING:
    from megalm.config.run import RunConfig

Check = Callable[["RunConfig"], Iterator[str]]


class Rule(NamedTuple):
    """A check and the recipe keys that it reads."""

    keys: frozenset[str]
    check: Check


RULES: list[Rule] = []


def _rule(*keys: str) -> Callable[[Check], Check]:
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


@_rule("model.hidden", "model.heads")
def _heads_divide_hidden(config: RunConfig) -> Iterator[str]:
    if config.model.hidden % config.model.heads:
        yield not_divisible("model.hidden", config.model.hidden, "model.heads", config.model.heads)


@_rule("model.heads", "model.kv_heads")
def _kv_heads_divide_heads(config: RunConfig) -> Iterator[str]:
    if config.model.heads % config.model.key_value_heads:
        yield not_divisible("model.heads", config.model.heads, "model.kv_heads", config.model.key_value_heads)


@_rule("model.heads", "parallel.tensor")
def _tensor_divides_heads(config: RunConfig) -> Iterator[str]:
    if config.model.heads % config.parallel.tensor:
        yield not_divisible("model.heads", config.model.heads, "parallel.tensor", config.parallel.tensor)


@_rule("model.kv_heads", "parallel.tensor")
def _tensor_divides_kv_heads(config: RunConfig) -> Iterator[str]:
    if config.model.kv_heads is not None and config.model.kv_heads % config.parallel.tensor:
        heads, tensor = config.model.kv_heads, config.parallel.tensor
        yield not_divisible("model.kv_heads", heads, "parallel.tensor", tensor)


@_rule("model.ffn", "model.hidden", "model.activation", "parallel.tensor")
def _tensor_divides_feed_forward(config: RunConfig) -> Iterator[str]:
    width = config.model.feed_forward
    if width % config.parallel.tensor:
        yield not_divisible(_feed_forward_name(config), width, "parallel.tensor", config.parallel.tensor)


@_rule("model.position", "model.hidden", "model.heads")
def _rotary_needs_pairs(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.position == "rotary" and model.hidden % model.heads == 0 and model.head_size % 2:
        even = [heads for heads in divisors(model.hidden) if model.hidden // heads % 2 == 0]
        remedy = f"use {list_values(even)}" if even else "make model.hidden even"
        yield (
            f"model.position=rotary turns pairs of features, but a head has model.hidden/model.heads="
            f"{model.head_size} of them with model.heads={model.heads}; {remedy}"
        )


@_rule("model.layers", "parallel.pipeline", "parallel.partition")
def _stages_have_layers(config: RunConfig) -> Iterator[str]:
    layers, stages, partition = config.model.layers, config.parallel.pipeline, config.parallel.partition
    if stages > layers:
        yield f"parallel.pipeline={stages} is more than model.layers={layers}; use at most {layers}"
    elif partition is not None and len(partition) != stages:
        yield (
            f"parallel.partition={list(partition)} names {len(partition)} stages, but "
            f"parallel.pipeline={stages}; give {stages} numbers of layers that add up to {layers}"
        )
    elif partition is not None and sum(partition) != layers:
        yield (
            f"parallel.partition={list(partition)} adds up to {sum(partition)} layers, but "
            f"model.layers={layers}; make the {stages} numbers add up to {layers}"
        )


@_rule("parallel.sequence", "model.sequence", "parallel.tensor")
def _tensor_divides_sequence(config: RunConfig) -> Iterator[str]:
    if config.parallel.sequence and config.model.sequence % config.parallel.tensor:
        length, tensor = config.model.sequence, config.parallel.tensor
        line = not_divisible("model.sequence", length, "parallel.tensor", tensor)
        yield f"{line}, or parallel.sequence=false"


@_rule("train.global_batch", "train.micro_batch")
def _micro_batch_divides(config: RunConfig) -> Iterator[str]:
    whole, part = config.train.global_batch, config.train.micro_batch
    if whole % part:
        yield not_divisible("train.global_batch", whole, "train.micro_batch", part)


@_rule("zero.stage", "parallel.pipeline")
def _no_zero3_pipeline(config: RunConfig) -> Iterator[str]:
    if config.zero.stage == 3 and config.parallel.pipeline > 1:
        yield (
            f"zero.stage=3 does not work with parallel.pipeline={config.parallel.pipeline}: DeepSpeed's "
            "ZeRO 3 broadcasts over all ranks between the pipeline's messages and would hang; "
            "use zero.stage 0, 1 or 2, or parallel.pipeline=1"
        )


@_rule("lr_schedule.warmup_steps", "train.steps")
def _warmup_ends(config: RunConfig) -> Iterator[str]:
    warmup, steps = config.lr_schedule.warmup_steps, config.train.steps
    if warmup > steps:
        yield f"lr_schedule.warmup_steps={warmup} is more than train.steps={steps}; use at most {steps}"


@_rule("train.stop_at", "train.steps")
def _stop_is_within(config: RunConfig) -> Iterator[str]:
    stop_at, steps = config.train.stop_at, config.train.steps
    if stop_at is not None and stop_at > steps:
        yield f"train.stop_at={stop_at} is more than train.steps={steps}; use at most {steps}"


@_rule("optim.kind", "optim.momentum")
def _momentum_is_used(config: RunConfig) -> Iterator[str]:
    if config.optim.momentum and config.optim.kind != "sgd":
        yield (
            f"optim.momentum={config.optim.momentum} has no effect with optim.kind={config.optim.kind}; "
            "use optim.kind=sgd, or set optim.betas instead"
        )


def check_world(config: RunConfig, world_size: int) -> int:
    """Return world_size / (tensor x pipeline), the size of the data axis.

    Raises ConfigError when the ranks do not make whole copies of the model, or the batch does not divide over
    the copies.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    ranks, copies = tensor * pipeline, world_size // (tensor * pipeline)
    layout = f"parallel.tensor={tensor} x parallel.pipeline={pipeline}"
    if world_size < ranks:
        raise ConfigError(
            f"{layout} needs {ranks} ranks, but {world_size} {'is' if world_size == 1 else 'are'} started; "
            f"start {ranks} or a multiple of it, or make parallel.tensor or parallel.pipeline smaller"
        )
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks are not divisible by {layout}, {ranks} ranks a copy of the model; "
            f"start {copies * ranks} or {(copies + 1) * ranks}"
        )
    whole, part = config.train.global_batch, config.train.micro_batch
    each = part * copies
    if whole % each:
        lower, upper = whole // each * each, (whole // each + 1) * each
        batches = f"{lower} or {upper}" if lower else f"{upper}"
        worlds = list_values([ranks * size for size in divisors(whole // part)])
        raise ConfigError(
            f"train.global_batch={whole} is not divisible by train.micro_batch={part} x {copies} "
            f"data-parallel ranks ({world_size} ranks / {ranks}); use {batches} "
            f"for train.global_batch, or {worlds} ranks"
        )
    return copies
