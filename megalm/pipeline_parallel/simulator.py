"""Proof and cost of a schedule: an event simulation of all stages' streams of actions. Imports no torch.

Owns the rules that any schedule must keep (what an action waits for, that nothing is missing or done twice,
that each link delivers in the order in which the receiver asks). Linear in the number of actions.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megalm.errors import MegalmError
from megalm.pipeline_parallel.schedules import Action, ActionKind, Schedule


class ScheduleError(MegalmError):
    """A schedule deadlocks, mixes up a link's order, or leaves out, doubles or invents an action."""


@dataclass(frozen=True)
class Simulation:
    """What one step of a schedule costs, in the units of the times that were given.

    `busy` and `peak_live` have one entry a stage. A microbatch's activations are live on a stage from the
    start of its forward to the end of its backward. `bubble` is idle time over total time of all stages.
    """

    makespan: float
    busy: tuple[float, ...]
    peak_live: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """Return the share of all stages' time that is spent waiting: 0 (never) to 1."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(
    schedule: Schedule, forward_time: float = 1.0, backward_time: float = 2.0, transfer_time: float = 0.0
) -> Simulation:
    """Run `schedule` on imagined stages and return its cost.

    A stage runs its actions in order. An action starts when the stage is free, its message has arrived
    (`transfer_time` after its source action ended; sends do not block) and, for a backward, the stage's own
    forward of that microbatch is done. Raises ScheduleError with the stages and actions concerned.
    """
    streams = [tuple(schedule.actions(stage)) for stage in range(schedule.stages)]
    _check_complete(schedule, streams)
    _check_links(schedule, streams)
    durations = {ActionKind.FORWARD: forward_time, ActionKind.BACKWARD: backward_time}
    makespan = _run(schedule, streams, durations, transfer_time)
    busy = tuple(sum(durations[action.kind] for action in stream) for stream in streams)
    return Simulation(makespan, busy, tuple(_peak_live(stream) for stream in streams))


def _check_complete(schedule: Schedule, streams: Sequence[Sequence[Action]]) -> None:
    expected = {
        Action(kind, microbatch, chunk)
        for kind in ActionKind
        for microbatch in range(schedule.microbatches)
        for chunk in range(schedule.chunks)
    }
    for stage, stream in enumerate(streams):
        times = Counter(stream)
        problems = (
            ("misses", expected - times.keys()),
            ("has the unknown action", times.keys() - expected),
            ("runs more than once", {action for action, count in times.items() if count > 1}),
        )
        for verb, actions in problems:
            if actions:
                named = min(actions, key=lambda action: (action.microbatch, action.chunk, action.kind.value))
                raise ScheduleError(f"stage {stage} {verb} {named} ({len(actions)} such)")


def _check_links(schedule: Schedule, streams: Sequence[Sequence[Action]]) -> None:
    """Compare, for each directed link, the order of the sends with the order of the receives.

    Point-to-point messages are matched by order (NCCL has no tags), so a difference would deliver the wrong
    microbatch. Activations and gradients travel on links of their own.
    """
    asked: dict[tuple[int, int, ActionKind], list[Action]] = {}
    wanted: list[dict[Action, tuple[int, int, ActionKind]]] = [{} for _ in streams]
    for stage, stream in enumerate(streams):
        for action in stream:
            source = schedule.source(stage, action)
            if source is not None:
                sender, sent = source
                link = (sender, stage, sent.kind)
                asked.setdefault(link, []).append(sent)
                wanted[sender][sent] = link
    sent_on: dict[tuple[int, int, ActionKind], list[Action]] = {link: [] for link in asked}
    for sender, stream in enumerate(streams):
        for action in stream:
            if action in wanted[sender]:
                sent_on[wanted[sender][action]].append(action)
    for link, receives in asked.items():
        for position, (send, receive) in enumerate(zip_longest(sent_on[link], receives)):
            if send != receive:
                sender, receiver, _ = link
                raise ScheduleError(
                    f"link from stage {sender} to stage {receiver} is out of order at message {position}: "
                    f"stage {sender} sends {send}, stage {receiver} expects {receive}"
                )


def _run(
    schedule: Schedule,
    streams: Sequence[Sequence[Action]],
    durations: dict[ActionKind, float],
    transfer_time: float,
) -> float:
    """Return when the last stage ends. A stage runs until it waits; the end of what it waits for wakes it."""
    ended: list[dict[Action, float]] = [{} for _ in streams]
    position = [0] * len(streams)
    clock = [0.0] * len(streams)
    waiting: dict[tuple[int, Action], int] = {}
    ready = deque(range(len(streams)))
    while ready:
        stage = ready.popleft()
        stream, own = streams[stage], ended[stage]
        while position[stage] < len(stream):
            action = stream[position[stage]]
            source = schedule.source(stage, action)
            start = clock[stage]
            if source is not None:
                arrival = ended[source[0]].get(source[1])
                if arrival is None:
                    waiting[source] = stage
                    break
                start = max(start, arrival + transfer_time)
            if action.kind is ActionKind.BACKWARD and (ActionKind.FORWARD, *action[1:]) not in own:
                break
            own[action] = clock[stage] = start + durations[action.kind]
            position[stage] += 1
            woken = waiting.pop((stage, action), None)
            if woken is not None:
                ready.append(woken)
    stuck = [stage for stage, stream in enumerate(streams) if position[stage] < len(stream)]
    if stuck:
        waits = (_describe_wait(schedule, stage, streams[stage][position[stage]], ended) for stage in stuck)
        raise ScheduleError("deadlock: " + "; ".join(waits))
    return max(clock)


def _describe_wait(schedule: Schedule, stage: int, action: Action, ended: Sequence[dict[Action, float]]) -> str:
    source = schedule.source(stage, action)
    if source is not None and source[1] not in ended[source[0]]:
        return f"stage {stage} at {action} waits for {source[1]} of stage {source[0]}"
    return f"stage {stage} at {action} comes before its own {action._replace(kind=ActionKind.FORWARD)}"


def _peak_live(stream: Sequence[Action]) -> int:
    live = peak = 0
    for action in stream:
        if action.kind is ActionKind.FORWARD:
            live += 1
            peak = max(peak, live)
        elif action.kind is ActionKind.BACKWARD:
            live -= 1
    return peak
