"""Rules between a recipe's keys about the context axis. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import divisors, list_values, rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


@rule("model.sequence", "sequence_warmup.start", "parallel.context", "parallel.sequence", "parallel.tensor")
def _context_divides_rows(config: RunConfig) -> Iterator[str]:
    context, tensor = config.parallel.context, config.parallel.tensor if config.parallel.sequence else 1
    if context == 1:
        return
    lengths = {"model.sequence": config.model.sequence, "sequence_warmup.start": config.sequence_warmup.start}
    for key, length in lengths.items():
        if length is None:
            continue
        step = 2 * context
        if length % step:
            below = length // step * step
            fitting = list_values([near for near in (below, below + step) if near])
            yield (
                f"{key}={length} does not divide into 2 x parallel.context={context} pieces, of which each rank has an "
                f"early and a late one; use {fitting}"
            )
        elif length // context % tensor:
            yield (
                f"{key}={length} is {length // context} tokens on each of parallel.context={context} ranks, which "
                f"parallel.tensor={tensor} does not divide; use a multiple of {2 * context * tensor}, or "
                "parallel.sequence=false"
            )


@rule("model.heads", "parallel.tensor", "parallel.context", "parallel.context_attention")
def _heads_divide_over_context(config: RunConfig) -> Iterator[str]:
    parallel, heads = config.parallel, config.model.heads
    if parallel.context == 1 or parallel.context_attention != "ulysses" or heads % parallel.tensor:
        return
    own = heads // parallel.tensor
    if own % parallel.context:
        count = "one head" if own == 1 else f"{own} heads"
        fitting = "" if own == 1 else f"{list_values(divisors(own))} for parallel.context, or "
        yield (
            f"parallel.context_attention=ulysses divides the {count} of a tensor rank (model.heads={heads} / "
            f"parallel.tensor={parallel.tensor}) over parallel.context={parallel.context}, which does not go; use "
            f"{fitting}parallel.context_attention=ring"
        )


@rule("parallel.context", "parallel.context_attention", "model.attention_pattern", "model.flash_attention")
def _rings_have_no_whole_rows(config: RunConfig) -> Iterator[str]:
    if config.parallel.context == 1 or config.parallel.context_attention != "ring":
        return
    model, remedy = config.model, "use parallel.context_attention=ulysses"
    if model.attention_pattern != "full":
        yield f"model.attention_pattern={model.attention_pattern} needs whole rows, which a ring never has; {remedy}"
    if not model.flash_attention:
        yield f"model.flash_attention=false makes whole matrices of scores, which a ring never has; {remedy}"


@rule("parallel.context", "train.compile")
def _context_excludes_compilation(config: RunConfig) -> Iterator[str]:
    if config.parallel.context > 1 and config.train.compile:
        yield (
            f"train.compile=true makes one program of a block, which the messages of parallel.context="
            f"{config.parallel.context} would part; use train.compile=false"
        )
