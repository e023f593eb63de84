"""Proof and cost of a schedule: an event simulation of all stages' streams of actions. Imports no torch.

Owns the rules that any schedule must keep (what an action waits for, that nothing is missing or done twice,
that each link delivers in the order in which the receiver asks). Linear in the number of actions.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megalm.errors import MegalmError
from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule

FORWARD, BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD
INPUT, WEIGHT = ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT

_Link = tuple[int, int, ActionKind]
"""Sending stage, receiving stage, and whether activations (FORWARD) or gradients (BACKWARD) travel on it."""


class ScheduleError(MegalmError):
    """A schedule deadlocks, mixes up a link's order, or leaves out, doubles or invents an action."""


@dataclass(frozen=True)
class Simulation:
    """What one step of a schedule costs, in the units of the times that were given.

    `busy`, `spans` and `peak_live` have one entry a stage. A span lasts from the begin of a stage's first action to the
    end of its last. `peak_live` counts chunks: the activations of one microbatch in one chunk are live on a stage from
    the start of the forward to the end of the backward.
    """

    makespan: float
    busy: tuple[float, ...]
    spans: tuple[float, ...]
    peak_live: tuple[float, ...]
    starts: tuple[tuple[float, ...], ...]
    """When each action of each stage begins."""

    @property
    def bubble(self) -> float:
        """Return the share of all stages' time that is spent waiting: 0 (never) to 1."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)

    @property
    def bubble_without_flush(self) -> float:
        """Return the share of the longest span that is spent waiting.

        It is the cost of a step where no stage waits for the others between steps (Qi et al. 2024, section 5.3).
        """
        return 1.0 - max(self.busy) / max(self.spans)


def simulate(
    schedule: Schedule,
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    transfer_time: float = 0.0,
    *,
    weight_time: float | None = None,
    kept: float = 1.0,
    most_in_flight: int | None = None,
) -> Simulation:
    """Run `schedule` on imagined stages and return its cost.

    The times are those of a microbatch on a whole stage, of whose layers each chunk holds an equal part; `weight_time`
    is the part of the backward that makes gradients of weights, half of it by default. `kept` is what they need between
    the two halves of a backward, as a share of the forward's activations.

    A stage runs its actions in order. An action starts when the stage is free, its message has arrived
    (`transfer_time` after its source action ended; sends do not block) and, for a backward, the stage's own
    forward of that microbatch is done. Where a schedule splits some backwards, the input gradient of a whole one is on
    its way before the weights' are made, as layers put these off. With `most_in_flight` a sender waits besides until no
    more messages than that are sent and not yet asked for on a link. Raises ScheduleError with the stages and actions
    concerned.
    """
    streams = [tuple(schedule.actions(stage)) for stage in range(schedule.stages)]
    _check_complete(schedule, streams)
    _check_links(schedule, streams)
    weight_time = backward_time / 2.0 if weight_time is None else weight_time
    times = {FORWARD: forward_time, BACKWARD: backward_time, INPUT: backward_time - weight_time, WEIGHT: weight_time}
    durations = {kind: time / schedule.chunks for kind, time in times.items()}
    run = _Run(schedule, streams, durations, transfer_time, most_in_flight)
    run.to_the_end()
    busy = tuple(sum(durations[action.kind] for action in stream) for stream in streams)
    peaks = tuple(peak_live(stream, kept) for stream in streams)
    spans = tuple(end - begins[0] for begins, end in zip(run.starts, run.clock, strict=True))
    return Simulation(max(run.clock), busy, spans, peaks, tuple(map(tuple, run.starts)))


def _check_complete(schedule: Schedule, streams: Sequence[Sequence[Action]]) -> None:
    for stage, stream in enumerate(streams):
        times = Counter(stream)
        expected = set(_expected(schedule, times))
        problems = (
            ("misses", expected - times.keys()),
            ("has the unknown action", times.keys() - expected),
            ("runs more than once", {action for action, count in times.items() if count > 1}),
        )
        for verb, actions in problems:
            if actions:
                named = min(actions, key=lambda action: (action.microbatch, action.chunk, action.kind.value))
                raise ScheduleError(f"stage {stage} {verb} {named} ({len(actions)} such)")


def _expected(schedule: Schedule, present: Counter[Action]) -> Iterator[Action]:
    """Yield what a stage must run: each forward, and its backward in one action or in two."""
    for microbatch in range(schedule.microbatches):
        for chunk in range(schedule.chunks):
            yield Action(FORWARD, microbatch, chunk)
            halves = [Action(kind, microbatch, chunk) for kind in (INPUT, WEIGHT)]
            whole = Action(BACKWARD, microbatch, chunk)
            yield from halves if whole not in present and present.keys() & set(halves) else [whole]


def _check_links(schedule: Schedule, streams: Sequence[Sequence[Action]]) -> None:
    """Compare, for each directed link, the order of the sends with the order of the receives.

    Point-to-point messages are matched by order (NCCL has no tags), so a difference would deliver the wrong
    microbatch. Activations and gradients travel on links of their own; within a stage there is no link.
    """
    asked: dict[_Link, list[Action]] = {}
    sent_on: dict[_Link, list[Action]] = {}
    for stage, stream in enumerate(streams):
        for action in stream:
            source, target = schedule.source(stage, action), schedule.target(stage, action)
            if source is not None and source[0] != stage:
                asked.setdefault((source[0], stage, source[1].kind), []).append(source[1])
            if target is not None and target[0] != stage:
                sent_on.setdefault((stage, target[0], target[1].kind), []).append(_result(action))
    for link in asked | sent_on:
        for position, (send, receive) in enumerate(zip_longest(sent_on.get(link, ()), asked.get(link, ()))):
            if send != receive:
                sender, receiver, _ = link
                raise ScheduleError(
                    f"link from stage {sender} to stage {receiver} is out of order at message {position}: "
                    f"stage {sender} sends {send}, stage {receiver} expects {receive}"
                )


def _result(action: Action) -> Action:
    """Return the action under whose name others wait for this one's result."""
    return action._replace(kind=BACKWARD) if action.kind is INPUT else action


class _Run:
    """The event loop. A stage runs until it waits; the end of what it waits for wakes it."""

    def __init__(
        self,
        schedule: Schedule,
        streams: Sequence[Sequence[Action]],
        durations: dict[ActionKind, float],
        transfer_time: float,
        most_in_flight: int | None,
    ) -> None:
        self.schedule, self.streams = schedule, streams
        self.durations, self.transfer_time, self.most_in_flight = durations, transfer_time, most_in_flight
        self.given: list[dict[Action, float]] = [{} for _ in streams]
        """When the result of each action was there."""
        self.clock = [0.0] * len(streams)
        self.starts: list[list[float]] = [[] for _ in streams]
        self.position = [0] * len(streams)
        self.waiting: dict[tuple[int, Action], int] = {}
        self.open: Counter[_Link] = Counter()
        self.blocked: dict[_Link, int] = {}
        self.ready = deque(range(len(streams)))

    def to_the_end(self) -> None:
        """Run all stages. Raises ScheduleError where none can go on."""
        while self.ready:
            stage = self.ready.popleft()
            while self.position[stage] < len(self.streams[stage]) and self._step(stage):
                pass
        stuck = [stage for stage, stream in enumerate(self.streams) if self.position[stage] < len(stream)]
        if stuck:
            raise ScheduleError("deadlock: " + "; ".join(self._describe_wait(stage) for stage in stuck))

    def _step(self, stage: int) -> bool:
        """Run the stage's next action, or note what it waits for and return False."""
        action = self.streams[stage][self.position[stage]]
        source, target = self.schedule.source(stage, action), self.schedule.target(stage, action)
        start = self.clock[stage]
        if source is not None:
            arrival = self.given[source[0]].get(source[1])
            if arrival is None:
                self.waiting[source] = stage
                return False
            start = max(start, arrival + (self.transfer_time if source[0] != stage else 0.0))
        own = self._own_before(action)
        if own is not None and own not in self.given[stage]:
            return False
        if target is not None and target[0] != stage:
            link = (stage, target[0], target[1].kind)
            if self.most_in_flight is not None and self.open[link] >= self.most_in_flight:
                self.blocked[link] = stage
                return False
            self.open[link] += 1
        if source is not None and source[0] != stage:
            self._take((source[0], stage, source[1].kind))
        result = _result(action)
        self.starts[stage].append(start)
        early = action.kind is BACKWARD and self.schedule.splits_backward
        self.given[stage][result] = start + self.durations[INPUT if early else action.kind]
        self.clock[stage] = start + self.durations[action.kind]
        self.position[stage] += 1
        woken = self.waiting.pop((stage, result), None)
        if woken is not None and woken != stage:
            self.ready.append(woken)
        return True

    def _take(self, link: _Link) -> None:
        self.open[link] -= 1
        woken = self.blocked.pop(link, None)
        if woken is not None:
            self.ready.append(woken)

    def _own_before(self, action: Action) -> Action | None:
        """Return what the stage itself must have done before."""
        if action.kind is FORWARD:
            return None
        return action._replace(kind=BACKWARD if action.kind is WEIGHT else FORWARD)

    def _describe_wait(self, stage: int) -> str:
        action = self.streams[stage][self.position[stage]]
        source = self.schedule.source(stage, action)
        if source is not None and source[1] not in self.given[source[0]]:
            return f"stage {stage} at {action} waits for {source[1]} of stage {source[0]}"
        own = self._own_before(action)
        if own is not None and own not in self.given[stage]:
            own = own._replace(kind=INPUT) if action.kind is WEIGHT else own
            return f"stage {stage} at {action} comes before its own {own}"
        return f"stage {stage} at {action} has {self.most_in_flight} messages open"


def peak_live(stream: Iterable[Action], kept: float = 1.0) -> float:
    """Return the most microbatches, each chunk counted, that a stage has begun and not ended at once.

    `kept`: what is held between the two halves of a backward pass, of one that is whole.
    """
    change = {FORWARD: 1.0, BACKWARD: -1.0, INPUT: kept - 1.0, WEIGHT: -kept}
    live = peak = 0.0
    for action in stream:
        live += change[action.kind]
        peak = max(peak, live)
    return peak
