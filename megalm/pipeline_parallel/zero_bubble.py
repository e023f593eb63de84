"""Schedules that split the backward pass and fill the bubble with gradients of weights. Imports no torch.

Orders are written as phases, words that are repeated: F0 is the next forward of chunk 0, B0 the next whole backward,
I0 the next input gradient, W the oldest weight gradient that is owed, whatever its chunk. p stages, m microbatches, s
the stage; times F of a forward, I and W of the two halves of a backward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule

_KINDS = {"F": ActionKind.FORWARD, "B": ActionKind.BACKWARD, "I": ActionKind.INPUT_GRADIENT}


def _written(phases: Iterable[tuple[int, str]]) -> Iterator[Action]:
    """Yield the actions of (times, words), the microbatches of each word counted up."""
    done: Counter[str] = Counter()
    owed: deque[Action] = deque()
    for times, words in phases:
        for word in times * words.split():
            if word == "W":
                yield owed.popleft()
                continue
            kind, chunk = _KINDS[word[0]], int(word[1:])
            direction = f"{kind is ActionKind.FORWARD}{chunk}"  # B and I take turns over the same microbatches
            microbatch, done[direction] = done[direction], done[direction] + 1
            yield Action(kind, microbatch, chunk)
            if kind is ActionKind.INPUT_GRADIENT:
                owed.append(Action(ActionKind.WEIGHT_GRADIENT, microbatch, chunk))


class ZeroBubbleH1(Schedule):
    """1F1B whose stages run their weight gradients `s` microbatches late, so that the last of them fill the end.

    Bubble (p-1)(F+I-W). A stage holds p - s activations and what s weight gradients need: at most 1F1B's memory.
    Source: Qi et al. 2024, section 2.1 and table 2.
    """

    splits_backward = True
    rounds = 1

    @property
    def whole_rounds(self) -> int:
        """Return at least the microbatches in which each phase stands."""
        return max(self.microbatches, self.rounds * (self.stages - 1))

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        warmup, late = self.rounds * (self.stages - 1 - stage), self.rounds * stage
        steady = microbatches - warmup - late
        return _written([(warmup, "F0"), (late, "F0 I0"), (steady, "F0 I0 W"), (warmup, "I0 W"), (late, "W")])


class ZeroBubbleH2(ZeroBubbleH1):
    """ZB-H1 with twice the forwards before the first backward, and weight gradients twice as late.

    Between a stage's own begin and end (p-1)(F+I-2W) are lost; the stages begin and end one after the other, so a step
    that waits for all of them at its end loses (p-1)F more. A stage holds 2(p-s) - 1 activations and what 2s weight
    gradients need. Source: Qi et al. 2024, section 2.2 and table 2.
    """

    rounds = 2


class ZeroBubbleV(Schedule):
    """Two chunks a stage, folded: no bubble but (p-1) chunks' forwards where F = I = W, in 1F1B's memory.

    Activations run down one leg of the V and up the other, so that the first backward begins on the stage where the
    first forward did. A stage holds 2p chunks' activations, as many bytes as 1F1B's first stage.
    Source: Qi et al. 2024 (ZB-V) and 2024b, section 4.
    """

    folded = True
    fixed_chunks = 2
    splits_backward = True

    @property
    def whole_rounds(self) -> int:
        """Return at least the microbatches in which each phase stands."""
        return max(self.microbatches, 2 * self.stages - 1)

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        before, behind = stage, self.stages - stage
        steady = microbatches - self.stages - behind + 1
        return _written(
            [
                (2 * behind - 1, "F0"),
                (before, "F1 F0"),
                (behind, "F1 I1 W"),
                (steady, "F0 I0 W F1 I1 W"),
                (behind - 1, "I0 W F1 I1 W"),
                (before, "I0 I1"),
                (behind, "I0 W"),
                (2 * before, "W"),
            ]
        )


class DualPipeV(Schedule):
    """Two chunks a stage, folded, with a forward and a whole backward in turn; only the ends split backwards.

    Backwards stand beside forwards of the other leg of the V, with which their communication may overlap. A stage holds
    2p + 1 chunks' activations. Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.2.1, cut in half: one of the two
    directions, folded.
    """

    folded = True
    fixed_chunks = 2
    splits_backward = True

    @property
    def whole_rounds(self) -> int:
        """Return at least the microbatches in which each phase stands."""
        return max(self.microbatches, 2 * self.stages)

    def order(self, stage: int, microbatches: int) -> Iterator[Action]:
        """Yield what `stage` runs in one step, in order."""
        own, behind = stage + 1, self.stages - 1 - stage
        turns = ("B1 B0 " * own).split()  # the second half of them is split
        return _written(
            [
                (2 * behind, "F0"),
                (own, "F0 F1"),
                (behind, "I1 W F1"),
                (microbatches - 2 * self.stages + own, "F0 B1 F1 B0"),
                (behind, "B1 F1 B0"),
                (1, " ".join(turns[:own])),
                (1, " ".join(turns[own:]).replace("B", "I")),
                (behind, "W I0"),
                (own, "W"),
            ]
        )
