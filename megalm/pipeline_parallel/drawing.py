"""A recipe's pipeline as text: which layers lie where, what a step costs, and who does what when. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megalm.config.ramps import rows_of_rank
from megalm.config.run import RunConfig
from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule
from megalm.pipeline_parallel.partition import partition_layers
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import Simulation, simulate

COLUMNS = 100
"""A drawing has at most so many columns, each as long as the forward of one chunk."""
_ENDS = 10
"""Rounds of a step, of as many microbatches as stages, in which its begin and its end have room."""
_LETTERS = dict(zip(ActionKind, "FBIW", strict=True))
_LEGEND = (
    "F forward, B backward, I its gradient of the input, W those of the weights, . waits; small letters: not the first "
    "chunk"
)


def draw_pipeline(config: RunConfig) -> str:
    """Return the stages' layers, the step's cost and a drawing of its begin, for one data rank and the whole batch."""
    parallel = config.parallel
    kind = SCHEDULES.get(parallel.schedule)
    microbatches = rows_of_rank(config, config.train.global_batch, data_ranks=1) // config.train.micro_batch
    schedule, cost = step_cost(kind, parallel.pipeline, microbatches, kind.fixed_chunks or parallel.virtual_stages)
    peaks = ", ".join(f"{peak / schedule.chunks:g}" for peak in cost.peak_live)
    lines = [
        f"{parallel.schedule}: {_count(parallel.pipeline, 'stage')} of {_count(schedule.chunks, 'chunk')}, "
        f"{_count(microbatches, 'microbatch')} a step on one data rank",
        *_layers(config, schedule),
        f"bubble {cost.bubble:.1%}, where a backward takes twice as long as a forward and messages no time",
        f"activations held at once, in those of a microbatch on a whole stage: {peaks}",
        "",
        *(_row(schedule, stage, cost.starts[stage]) for stage in range(schedule.stages)),
        _LEGEND,
    ]
    return "\n".join(lines)


def step_cost(
    kind: Callable[[int, int, int], Schedule], stages: int, microbatches: int, chunks: int
) -> tuple[Schedule, Simulation]:
    """Return a schedule with what it costs where the backward of a chunk takes 2 and its forward 1.

    Between the ends of a step every schedule repeats itself, round by round of as many microbatches as stages. So of a
    long step two shorter ones are simulated, of `_ENDS` rounds and enough for a drawing, that differ by one round, and
    their difference is added for each round that is left out. The schedule, and the starts of its actions, are then
    those of the longer of the two: they begin as those of the whole step.
    """

    def simulated(count: int) -> tuple[Schedule, Simulation]:
        schedule = kind(stages, count, chunks)
        return schedule, simulate(schedule, float(chunks), 2.0 * chunks)

    left_out = (microbatches - COLUMNS) // stages - _ENDS
    if left_out < 1:
        return simulated(microbatches)
    _, less = simulated(microbatches - (left_out + 1) * stages)
    schedule, more = simulated(microbatches - left_out * stages)

    def whole(of_less: Sequence[float], of_more: Sequence[float]) -> tuple[float, ...]:
        return tuple(b + left_out * (b - a) for a, b in zip(of_less, of_more, strict=True))

    (makespan,) = whole([less.makespan], [more.makespan])
    busy, spans = whole(less.busy, more.busy), whole(less.spans, more.spans)
    return schedule, Simulation(makespan, busy, spans, whole(less.peak_live, more.peak_live), more.starts)


def _layers(config: RunConfig, schedule: Schedule) -> list[str]:
    """Return a line a stage with the parts of the model that it holds."""
    placement = schedule.placement
    parts = partition_layers(config.model.layers, placement, config.parallel.partition)
    lines = []
    for stage in range(placement.stages):
        held = [parts[placement.place(stage, chunk)] for chunk in range(placement.chunks)]
        names = ["embedding"] if stage == 0 else []
        names += [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in held]
        ends = ["head", "further tokens"] if config.model.mtp_depth else ["head"]
        names += ends if stage == placement.last_stage else []
        lines.append(f"stage {stage}: layers {', '.join(names)}")
    return lines


def _row(schedule: Schedule, stage: int, starts: tuple[float, ...]) -> str:
    cells: list[str] = []
    for action, start in zip(schedule.actions(stage), starts, strict=True):
        if start >= COLUMNS:
            return "".join(cells)[:COLUMNS] + " ..."
        cells += "." * (round(start) - len(cells)) + _cell(action)
    return "".join(cells)


def _cell(action: Action) -> str:
    letter = _LETTERS[action.kind]
    return (letter.lower() if action.chunk else letter) * (2 if action.kind is ActionKind.BACKWARD else 1)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('h') else 's'}"
