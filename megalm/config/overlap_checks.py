"""Rules between a recipe's keys about communication that runs beside computation. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


@rule("overlap.gradients", "zero.stage")
def _zero_1_reduces_at_the_end(config: RunConfig) -> Iterator[str]:
    if config.overlap.gradients and config.zero.stage == 1:
        yield (
            "overlap.gradients=true does not work with zero.stage=1: DeepSpeed's stage 1 reduces gradients once, after "
            "the last microbatch, when nothing is computed any more; use zero.stage 0, 2 or 3, or "
            "overlap.gradients=false"
        )


@rule("overlap.gradients", "zero.stage", "parallel.pipeline")
def _zero_2_overlaps_within_a_stage_alone(config: RunConfig) -> Iterator[str]:
    if config.overlap.gradients and config.zero.stage == 2 and config.parallel.pipeline > 1:
        yield (
            f"overlap.gradients=true does not work with zero.stage=2 and parallel.pipeline={config.parallel.pipeline}: "
            "DeepSpeed then waits for the whole device after each microbatch, for the receive of the pipeline's next "
            "message too, and would hang; use zero.stage=0, parallel.pipeline=1 or overlap.gradients=false"
        )


@rule("overlap.tensor_chunks", "train.compile")
def _compiled_layers_are_whole(config: RunConfig) -> Iterator[str]:
    chunks = config.overlap.tensor_chunks
    if chunks > 1 and config.train.compile:
        yield (
            f"overlap.tensor_chunks={chunks} excludes train.compile=true: a compiled block waits for each collective "
            "where it stands; use overlap.tensor_chunks=1, or train.compile=false"
        )


@rule(
    *("overlap.tensor_chunks", "train.micro_batch", "model.sequence"),
    *("parallel.context", "parallel.tensor", "parallel.sequence"),
)
def _chunks_have_tokens(config: RunConfig) -> Iterator[str]:
    chunks, parallel = config.overlap.tensor_chunks, config.parallel
    ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
    tokens = config.train.micro_batch * config.model.sequence // ranks
    if parallel.tensor > 1 and chunks > tokens > 0:
        yield (
            f"overlap.tensor_chunks={chunks} is more than the {tokens} tokens of a microbatch that a rank has; use a "
            "few, such as overlap.tensor_chunks=2"
        )
