"""Pipeline schedules as data: the stream of actions that each stage runs in one training step.

A schedule says what a stage computes and in which order; it knows nothing of tensors or messages and imports
no torch. `simulator` proves a schedule right and says what it costs, `executor` runs one stage of it. To add
a schedule, subclass `Schedule`, give `order`, and register it. Those that split the backward pass are in
`zero_bubble`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalm.pipeline_parallel.actions import Action, ActionKind, Placement, Schedule
from megalm.pipeline_parallel.zero_bubble import DualPipeV, ZeroBubbleH1, ZeroBubbleH2, ZeroBubbleV
from megalm.registry import Registry

SCHEDULES: Registry[type[Schedule]] = Registry("schedule")
SCHEDULES.register("zb-h1")(ZeroBubbleH1)
SCHEDULES.register("zb-h2")(ZeroBubbleH2)
SCHEDULES.register("zb-v")(ZeroBubbleV)
SCHEDULES.register("dualpipe-v")(DualPipeV)


def placement_of(schedule: str, stages: int, virtual_stages: int) -> Placement:
    """Return where the pieces of the model lie under the schedule of that name."""
    return SCHEDULES.get(schedule).placement_of(stages, virtual_stages)


@SCHEDULES.register("gpipe")
class GPipe(Schedule):
    """All forwards, then all backwards: every stage holds the activations of all microbatches.

    Bubble (p-1)/(m+p-1) of the time of p stages with m microbatches. Source: Huang et al. 2019, section 2.3;
    the backwards run in the order of the forwards, so that every link carries microbatches in ascending
    order.
    """

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        for microbatch in range(microbatches):
            yield Action(ActionKind.FORWARD, microbatch)
        for microbatch in range(microbatches):
            yield Action(ActionKind.BACKWARD, microbatch)


@SCHEDULES.register("1f1b")
class OneForwardOneBackward(Schedule):
    """Forwards until the first gradient can come back, then one forward and one backward in turn.

    The bubble is GPipe's, (p-1)/(m+p-1), but a stage holds the activations of min(p - stage, m) microbatches
    only. Source: Narayanan et al. 2019 (PipeDream), section 3.2, with a flush after every step (Narayanan et
    al. 2021, section 2.2.1).
    """

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        forwards = [Action(ActionKind.FORWARD, microbatch) for microbatch in range(microbatches)]
        backwards = [Action(ActionKind.BACKWARD, microbatch) for microbatch in range(microbatches)]
        return _alternating(forwards, backwards, self.stages - 1 - stage)


@SCHEDULES.register("interleaved")
class Interleaved(Schedule):
    """1F1B over v chunks a stage, depth first: p microbatches go through a chunk, then the same ones through the next.

    Bubble (p-1)/(vm+p-1), a v-th of 1F1B's, for v times the messages. Stage s holds min(2(p-1-s) + (v-1)p + 1, vm)
    activations of a chunk. Written for multiples of p microbatches. Source: Narayanan et al. 2021, section 2.2.2.
    """

    fixed_chunks = None

    @property
    def whole_rounds(self) -> int:
        """Return the next multiple of the stages."""
        return -(-self.microbatches // self.stages) * self.stages

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        p, v = self.stages, self.chunks
        runs = [(first, chunk) for first in range(0, microbatches, p) for chunk in range(v)]
        forwards = [Action(ActionKind.FORWARD, first + i, chunk) for first, chunk in runs for i in range(p)]
        backwards = [Action(ActionKind.BACKWARD, first + i, v - 1 - chunk) for first, chunk in runs for i in range(p)]
        return _alternating(forwards, backwards, 2 * (p - 1 - stage) + (v - 1) * p)


@SCHEDULES.register("breadth-first")
class BreadthFirst(Schedule):
    """GPipe over v chunks a stage, breadth first: all microbatches go through a chunk before any goes through the next.

    Bubble (p-1)/(vm+p-1) for m >= p; a stage holds the activations of all microbatches. The gradients of a chunk are
    whole early, one chunk after the other. Source: Lamy-Poirier 2022, section 4.
    """

    fixed_chunks = None

    @property
    def most_in_flight(self) -> int:
        """Return all microbatches: the last stage is through with many before the first begins its next chunk."""
        return max(self.stages, self.microbatches)

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        for chunk in range(self.chunks):
            for microbatch in range(microbatches):
                yield Action(ActionKind.FORWARD, microbatch, chunk)
        for chunk in reversed(range(self.chunks)):
            for microbatch in range(microbatches):
                yield Action(ActionKind.BACKWARD, microbatch, chunk)


def _alternating(forwards: list[Action], backwards: list[Action], warmup: int) -> Iterator[Action]:
    """Yield `warmup` forwards, then one forward and one backward in turn, then the other backwards."""
    yield from forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[max(0, len(forwards) - warmup) :]
