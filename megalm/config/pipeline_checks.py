"""Rules between a recipe's keys about the pipeline. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import rule
from megalm.config.choices import LOOPED_SCHEDULES, SPLITTING_SCHEDULES

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


@rule("model.layers", "parallel.pipeline", "parallel.schedule", "parallel.virtual_stages", "parallel.partition")
def _stages_have_layers(config: RunConfig) -> Iterator[str]:
    layers, stages, partition = config.model.layers, config.parallel.pipeline, config.parallel.partition
    chunks = config.parallel.chunks
    places = stages * chunks
    each = f"parallel.pipeline={stages}"
    if chunks > 1:
        each += f" x {chunks} chunks a stage (parallel.schedule={config.parallel.schedule})"
    if places > layers:
        yield f"{each} is more than model.layers={layers}; use at most {layers}" + (" together" if chunks > 1 else "")
    elif partition is not None and len(partition) != places:
        what = "chunks, in the order of the model," if chunks > 1 else "stages,"
        yield (
            f"parallel.partition={list(partition)} names {len(partition)} {what} but "
            f"{each}; give {places} numbers of layers that add up to {layers}, or null for an even one"
        )
    elif partition is not None and sum(partition) != layers:
        yield (
            f"parallel.partition={list(partition)} adds up to {sum(partition)} layers, but "
            f"model.layers={layers}; make the {places} numbers add up to {layers}, or use null for an even one"
        )


@rule("parallel.schedule", "parallel.virtual_stages")
def _looped_schedules_have_chunks(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.schedule in LOOPED_SCHEDULES and parallel.virtual_stages == 1:
        yield (
            f"parallel.schedule={parallel.schedule} needs parallel.virtual_stages of 2 or more: with one chunk of "
            "layers a stage there is nothing to interleave; set it, or use parallel.schedule=1f1b"
        )


@rule("zero.stage", "parallel.pipeline")
def _no_zero3_pipeline(config: RunConfig) -> Iterator[str]:
    if config.zero.stage == 3 and config.parallel.pipeline > 1:
        yield (
            f"zero.stage=3 does not work with parallel.pipeline={config.parallel.pipeline}: DeepSpeed's "
            "ZeRO 3 broadcasts over all ranks between the pipeline's messages and would hang; "
            "use zero.stage 0, 1 or 2, or parallel.pipeline=1"
        )


@rule("zero.stage", "parallel.schedule")
def _zero3_runs_a_stage_in_one_piece(config: RunConfig) -> Iterator[str]:
    schedule = config.parallel.schedule
    if config.zero.stage == 3 and schedule in LOOPED_SCHEDULES + SPLITTING_SCHEDULES:
        yield (
            f"zero.stage=3 excludes parallel.schedule={schedule}: DeepSpeed gathers and drops weights around whole "
            "forward and backward passes; use zero.stage 0, 1 or 2, or parallel.schedule=1f1b"
        )


@rule("train.compile", "parallel.schedule")
def _compiled_blocks_are_not_split(config: RunConfig) -> Iterator[str]:
    schedule = config.parallel.schedule
    if config.train.compile and schedule in SPLITTING_SCHEDULES:
        yield (
            f"train.compile=true excludes parallel.schedule={schedule}: a compiled block makes the gradients of its "
            "input and of its weights in one program; use train.compile=false, or parallel.schedule=interleaved or 1f1b"
        )
