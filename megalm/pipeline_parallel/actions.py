"""What a pipeline schedule is made of: pieces of work, where the pieces of the model lie, and who waits for whom.

Owns the rules that hold for every schedule; the orders themselves are in `schedules` and `zero_bubble`. Imports no
torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class ActionKind(Enum):
    """What a stage does with one microbatch.

    A backward pass is one action, or two: the gradient of what came in, for which the stage before waits, and those of
    the weights, for which nobody does (Qi et al. 2024, section 2).
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"

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


@dataclass(frozen=True)
class Placement:
    """Where the stages * chunks pieces of the model lie, in the order of its layers ("places", from 0).

    Each stage holds `chunks` of them. Looped, place i is on stage i mod stages (Narayanan et al. 2021, section 2.2.2);
    folded, every second round runs back from the last stage to the first, so that with two chunks the first stage holds
    the first and the last piece (Qi et al. 2024b, section 4).
    """

    stages: int
    chunks: int = 1
    folded: bool = False

    @property
    def places(self) -> int:
        """Return the number of pieces of the model."""
        return self.stages * self.chunks

    def place(self, stage: int, chunk: int) -> int:
        """Return the place of the stage's piece number `chunk`."""
        back = self.folded and chunk % 2 == 1
        return chunk * self.stages + (self.stages - 1 - stage if back else stage)

    def holder(self, place: int) -> tuple[int, int]:
        """Return (stage, chunk) of a place."""
        chunk, stage = divmod(place, self.stages)
        return (self.stages - 1 - stage if self.folded and chunk % 2 == 1 else stage), chunk

    @property
    def last_stage(self) -> int:
        """Return the stage of the last place, which computes the loss."""
        return self.holder(self.places - 1)[0]


class Schedule(ABC):
    """The order of work of `stages` pipeline stages, of `chunks` pieces each, over the `microbatches` of one step.

    Any number of microbatches will do. Raises ValueError if there is less than one stage, microbatch or chunk.
    """

    folded = False
    """Whether the pieces of the model lie folded, see `Placement`."""
    fixed_chunks: int | None = 1
    """How many chunks a stage has; None: as many as the recipe says."""
    splits_backward = False
    """Whether some backward passes are two actions."""

    def __init__(self, stages: int, microbatches: int, chunks: int | None = None) -> None:
        chunks = chunks or self.fixed_chunks or 1
        if stages < 1 or microbatches < 1 or chunks < 1:
            sizes = f"{stages}, {microbatches} and {chunks}"
            raise ValueError(f"a schedule needs at least 1 stage, 1 microbatch and 1 chunk, got {sizes}")
        assert self.fixed_chunks in (None, chunks), f"{type(self).__name__} with {chunks} chunks"
        self.stages = stages
        self.microbatches = microbatches
        self.chunks = chunks
        self.placement = self.placement_of(stages, chunks)

    @classmethod
    def placement_of(cls, stages: int, chunks: int) -> Placement:
        """Return where the pieces of the model lie; `chunks` is what the recipe says."""
        return Placement(stages, cls.fixed_chunks or chunks, cls.folded)

    @property
    def whole_rounds(self) -> int:
        """Return the number of microbatches, `microbatches` or more, for which `order` is written."""
        return self.microbatches

    @property
    def most_in_flight(self) -> int:
        """Return how many messages on a link may be sent and not yet asked for, for no stage to wait in a circle."""
        return self.stages

    @abstractmethod
    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in a step of so many microbatches, in order."""

    def actions(self, stage: int) -> Iterator[Action]:
        """Yield what `stage` (from 0) runs in one step, in order.

        Microbatches beyond those of the step are left out of all stages' streams. What is left waits for nothing else
        than before, so it makes no circle of waits and keeps the order of messages on every link.
        """
        return (a for a in self.order(stage, self.whole_rounds) if a.microbatch < self.microbatches)

    def source(self, stage: int, action: Action) -> tuple[int, Action] | None:
        """Return the stage and action whose result `stage` receives for `action`; None where it gets none.

        Activations come from the place before, gradients from the place behind, where BACKWARD stands for an input
        gradient too. The stage may be the same.
        """
        return self._neighbour(stage, action, towards=-1)

    def target(self, stage: int, action: Action) -> tuple[int, Action] | None:
        """Return the stage and action that the result of `action` is for, as `source` does."""
        return self._neighbour(stage, action, towards=1)

    def _neighbour(self, stage: int, action: Action, towards: int) -> tuple[int, Action] | None:
        if action.kind is ActionKind.WEIGHT_GRADIENT:
            return None
        is_forward = action.kind is ActionKind.FORWARD
        place = self.placement.place(stage, action.chunk) + (towards if is_forward else -towards)
        if not 0 <= place < self.placement.places:
            return None
        other, chunk = self.placement.holder(place)
        return other, Action(ActionKind.FORWARD if is_forward else ActionKind.BACKWARD, action.microbatch, chunk)
