"""The rules of a recipe's loop: how long a run is, what happens in it, and what looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import not_divisible, rule
from megalm.config.ramps import ramp_steps, sequence_steps

if TYPE_CHECKING:
    from megalm.config.run import RunConfig

COMPILED_MASKS = (
    "train.compile=true does not work with dropout and fused kernels: they are given its key as a number, which a "
    "compiled program would keep; use model.kernels=reference, or train.compile=false"
)
_BATCH_RAMP = ("batch_ramp.start", "batch_ramp.increment", "batch_ramp.every")
_LENGTH = ("train.steps", "train.tokens", "train.epochs", "train.global_batch", "model.sequence", *_BATCH_RAMP)


@rule("train.steps", "train.tokens", "train.epochs")
def _one_key_says_how_long(config: RunConfig) -> Iterator[str]:
    given = {key: getattr(config.train, key) for key in ("steps", "tokens", "epochs")}
    found = [f"train.{key}={value:g}" for key, value in given.items() if value is not None]
    if not found:
        yield "nothing says how long the run is; set train.steps, train.tokens or train.epochs"
    elif len(found) > 1:
        yield f"{' and '.join(found)} say twice how long the run is; keep one, and make the others null"


@rule("train.init_from", "train.init_optimizer")
def _optimizer_comes_from_somewhere(config: RunConfig) -> Iterator[str]:
    if config.train.init_optimizer and config.train.init_from is None:
        yield "train.init_optimizer=true says not whose state it is to start with; set train.init_from to a run of its"


@rule("batch_ramp.start", "batch_ramp.every", "sequence_warmup.start", "sequence_warmup.every")
def _ramps_say_when(config: RunConfig) -> Iterator[str]:
    for key in ("batch_ramp", "sequence_warmup"):
        section = getattr(config, key)
        if section.start is not None and section.every is None:
            yield f"{key}.start={section.start} does not say after how many steps it grows; set {key}.every"


@rule(*_LENGTH)
def _batch_ramp_ends(config: RunConfig) -> Iterator[str]:
    start, whole, steps = config.batch_ramp.start, config.train.global_batch, config.known_steps
    if start is None or config.batch_ramp.every is None:
        return
    if start >= whole:
        yield f"batch_ramp.start={start} is not below train.global_batch={whole}, to which it grows; use a smaller one"
    elif steps is not None and ramp_steps(config) >= steps:
        yield (
            f"batch_ramp reaches train.global_batch={whole} after {ramp_steps(config)} steps, which is not before the "
            f"end of {_length(config)}; use a smaller batch_ramp.every or a larger batch_ramp.increment"
        )


@rule("sequence_warmup.start", "sequence_warmup.every", "parallel.sequence", "parallel.tensor", *_LENGTH)
def _sequence_warmup_ends(config: RunConfig) -> Iterator[str]:
    start, whole, steps = config.sequence_warmup.start, config.model.sequence, config.known_steps
    if start is None or config.sequence_warmup.every is None:
        return
    doublings = whole // start
    if start >= whole or whole % start or doublings & (doublings - 1):
        halves = [whole >> n for n in range(1, 5) if whole % (1 << n) == 0]
        use = f"use {', '.join(map(str, halves))}" if halves else "leave it out: an odd number has no half"
        yield f"sequence_warmup.start={start} does not become model.sequence={whole} by doubling; {use}"
    elif config.parallel.sequence and start % config.parallel.tensor:
        yield not_divisible("sequence_warmup.start", start, "parallel.tensor", config.parallel.tensor)
    elif steps is not None and sequence_steps(config) >= steps:
        yield (
            f"sequence_warmup reaches model.sequence={whole} after {sequence_steps(config)} steps, which is not before "
            f"the end of {_length(config)}; use a smaller sequence_warmup.every or a larger sequence_warmup.start"
        )


@rule("lr_schedule.warmup_steps", "lr_schedule.cooldown_steps", *_LENGTH)
def _warmup_ends(config: RunConfig) -> Iterator[str]:
    warmup, cooldown, steps = config.lr_schedule.warmup_steps, config.lr_schedule.cooldown_steps, config.known_steps
    if steps is None:
        return
    if warmup > steps:
        yield f"lr_schedule.warmup_steps={warmup} is more than {_length(config)}; use at most {steps}"
    elif warmup + cooldown > steps:
        yield (
            f"lr_schedule.cooldown_steps={cooldown} and the warm-up's {warmup} are more than {_length(config)}; "
            f"use at most {steps - warmup}"
        )


def _length(config: RunConfig) -> str:
    """Return what says how long the run is: train.steps=600, or the steps of train.tokens=5000000."""
    if config.train.steps is not None:
        return f"train.steps={config.train.steps}"
    return f"the {config.known_steps} steps of train.tokens={config.train.tokens}"


@rule("lr_schedule.kind", "lr_schedule.min_lr_ratio", "lr_schedule.milestones")
def _shapes_can_be_drawn(config: RunConfig) -> Iterator[str]:
    schedule = config.lr_schedule
    if schedule.kind == "exponential" and schedule.min_lr_ratio == 0.0:
        yield "lr_schedule.min_lr_ratio=0.0 is never reached with lr_schedule.kind=exponential; use one above 0"
    if list(schedule.milestones) != sorted(schedule.milestones):
        yield f"lr_schedule.milestones={list(schedule.milestones)} do not rise; order them"


@rule("train.stop_at", *_LENGTH)
def _stop_is_within(config: RunConfig) -> Iterator[str]:
    stop_at, steps = config.train.stop_at, config.known_steps
    if stop_at is not None and steps is not None and stop_at > steps:
        yield f"train.stop_at={stop_at} is more than {_length(config)}; use at most {steps}"


@rule("early_stop.metric", "evaluate.every", "optim.ema_decay")
def _watched_metrics_are_measured(config: RunConfig) -> Iterator[str]:
    metric = config.early_stop.metric or ""
    if metric.startswith("evaluate/") and config.evaluate.every == 0:
        yield f"early_stop.metric={metric} is measured at the end alone with evaluate.every=0; use evaluate.every=100"
    if "ema" in metric and config.optim.ema_decay is None:
        yield f"early_stop.metric={metric} needs averaged weights; set optim.ema_decay, or use evaluate/loss"


@rule("checkpoint.keep_every", "checkpoint.every")
def _kept_steps_are_saved(config: RunConfig) -> Iterator[str]:
    section = config.checkpoint
    if section.keep_every is not None and section.every and section.keep_every % section.every:
        above = -(-section.keep_every // section.every) * section.every
        yield (
            f"checkpoint.keep_every={section.keep_every} is not a multiple of checkpoint.every={section.every}, so few "
            f"of its steps are saved; use {above}"
        )


@rule("checkpoint.keep_best", "checkpoint.every", "evaluate.every", "optim.ema_decay")
def _best_is_measured(config: RunConfig) -> Iterator[str]:
    metric, saves, measures = config.checkpoint.keep_best or "", config.checkpoint.every, config.evaluate.every
    if "ema" in metric and config.optim.ema_decay is None:
        yield f"checkpoint.keep_best={metric} needs averaged weights; set optim.ema_decay, or use evaluate/loss"
    if metric.startswith("evaluate/") and saves and (not measures or (saves % measures and measures % saves)):
        yield (
            f"checkpoint.keep_best={metric} is measured each evaluate.every={measures} steps and saved each "
            f"checkpoint.every={saves}, seldom the same; use evaluate.every={saves}"
        )


@rule("profile.start", "profile.steps", "train.stop_at", *_LENGTH)
def _profile_is_within(config: RunConfig) -> Iterator[str]:
    start, steps, stop_at = config.profile.start, config.profile.steps, config.train.stop_at
    end = stop_at or config.known_steps
    if start is not None and end is not None and start + steps - 1 > end:
        remedy = f"profile.steps={end - start + 1}" if start <= end else f"profile.start={end}"
        where = _length(config) if stop_at is None else f"train.stop_at={stop_at}"
        yield (
            f"profile.start={start} with profile.steps={steps} reaches to step {start + steps - 1}, but the run ends "
            f"at {where}; use {remedy} at most"
        )


@rule("profile.memory_at", "train.stop_at", *_LENGTH)
def _memory_is_looked_at_within(config: RunConfig) -> Iterator[str]:
    at, end = config.profile.memory_at, config.train.stop_at or config.known_steps
    if at is not None and end is not None and at > end:
        yield f"profile.memory_at={at} is a step behind the last one, {end}; use at most {end}"


@rule("inspect.every", *_LENGTH)
def _layers_are_sampled(config: RunConfig) -> Iterator[str]:
    every, steps = config.inspect.every, config.known_steps
    if steps is not None and every > steps:
        yield f"inspect.every={every} is more than {_length(config)}, so nothing is sampled; use at most {steps}"


@rule("train.compile", "model.kernels", "run.device", "model.dropout")
def _programs_draw_no_masks(config: RunConfig) -> Iterator[str]:
    kernels, device = config.model.kernels, config.run.device
    fused = kernels == "fused" or (kernels == "auto" and device == "cuda")
    if config.train.compile and config.model.draws_masks and fused:
        yield COMPILED_MASKS


@rule("train.compile", "zero.stage", "inspect.every")
def _blocks_can_be_compiled(config: RunConfig) -> Iterator[str]:
    if config.train.compile and config.zero.stage == 3:
        yield (
            "train.compile=true does not work with zero.stage=3: DeepSpeed gathers weights by hooks within the blocks, "
            "which a compiled program has no place for; use zero.stage 0, 1 or 2, or train.compile=false"
        )
    if config.train.compile and config.inspect.every:
        yield (
            f"inspect.every={config.inspect.every} looks into the blocks, which train.compile=true makes programs "
            "without an inside; use inspect.every=0, or train.compile=false"
        )


@rule("log.sinks")
def _sinks_are_named_once(config: RunConfig) -> Iterator[str]:
    sinks = config.log.sinks
    if len(set(sinks)) < len(sinks):
        yield f"log.sinks=[{', '.join(sinks)}] names one twice; use [{', '.join(dict.fromkeys(sinks))}]"
