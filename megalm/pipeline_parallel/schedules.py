"""Pipeline schedules as data: the stream of actions that each stage runs in one training step.

A schedule says what a stage computes and in which order; it knows nothing of tensors or messages and imports
no torch. `simulator` proves a schedule right and says what it costs, `executor` runs one stage of it. To add
a schedule, subclass `Schedule`, give `actions`, and register it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from megalm.registry import Registry


class ActionKind(Enum):
    """What a stage does with one microbatch."""

    FORWARD = "forward"
    BACKWARD = "backward"

    # Actions are keys of the simulator's tables; members are singletons, so identity is a valid and far
    # cheaper hash than Enum's own, which hashes the name in Python.
    __hash__ = object.__hash__


class Action(NamedTuple):
    """One piece of work: `kind` of `microbatch` (from 0) in `chunk`, the stage's n-th piece of the model."""

    kind: ActionKind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        suffix = f" of chunk {self.chunk}" if self.chunk else ""
        return f"{self.kind.name}({self.microbatch}){suffix}"


class Schedule(ABC):
    """The order of work of `stages` pipeline stages over the `microbatches` of one step.

    Raises ValueError if there is less than one stage or less than one microbatch. There may be fewer
    microbatches than stages.
    """

    chunks = 1

    def __init__(self, stages: int, microbatches: int) -> None:
        if stages < 1 or microbatches < 1:
            raise ValueError(f"a schedule needs at least 1 stage and 1 microbatch, got {stages} and {microbatches}")
        self.stages = stages
        self.microbatches = microbatches

    @abstractmethod
    def actions(self, stage: int) -> Iterator[Action]:
        """Yield what `stage` (from 0) runs in one step, in order."""

    def source(self, stage: int, action: Action) -> tuple[int, Action] | None:
        """Return the stage and action whose result `stage` receives for `action`; None where it gets none.

        Activations go up one stage, gradients go down one.
        """
        if action.kind is ActionKind.FORWARD:
            return (stage - 1, action) if stage > 0 else None
        return (stage + 1, action) if stage < self.stages - 1 else None


SCHEDULES: Registry[type[Schedule]] = Registry("schedule")


@SCHEDULES.register("gpipe")
class GPipe(Schedule):
    """All forwards, then all backwards: every stage holds the activations of all microbatches.

    Bubble (p-1)/(m+p-1) of the time of p stages with m microbatches. Source: Huang et al. 2019, section 2.3;
    the backwards run in the order of the forwards, so that every link carries microbatches in ascending
    order.
    """

    def actions(self, stage: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        for microbatch in range(self.microbatches):
            yield Action(ActionKind.FORWARD, microbatch)
        for microbatch in range(self.microbatches):
            yield Action(ActionKind.BACKWARD, microbatch)


@SCHEDULES.register("1f1b")
class OneForwardOneBackward(Schedule):
    """Forwards until the first gradient can come back, then one forward and one backward in turn.

    The bubble is GPipe's, (p-1)/(m+p-1), but a stage holds the activations of min(p - stage, m) microbatches
    only. Source: Narayanan et al. 2019 (PipeDream), section 3.2, with a flush after every step (Narayanan et
    al. 2021, section 2.2.1).
    """

    def actions(self, stage: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        warmup = min(self.stages - 1 - stage, self.microbatches)
        for microbatch in range(warmup):
            yield Action(ActionKind.FORWARD, microbatch)
        for microbatch in range(warmup, self.microbatches):
            yield Action(ActionKind.FORWARD, microbatch)
            yield Action(ActionKind.BACKWARD, microbatch - warmup)
        for microbatch in range(self.microbatches - warmup, self.microbatches):
            yield Action(ActionKind.BACKWARD, microbatch)
