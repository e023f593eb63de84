"""Activations and gradients between pipeline stages, without waiting.

Sizes are known on both sides beforehand, so no header travels. `pipeline_parallel` decides which stages talk, and the
order of messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.mesh import CARGOES, Cargo, ParallelMesh
from megalm.distributed.progress import progress


class Route(NamedTuple):
    """What one stage sends to another."""

    cargo: Cargo
    sender: int
    receiver: int


def chain(stages: int) -> list[Route]:
    """Return the routes of stages that hold one piece of the model each: activations up, gradients down."""
    pairs = [(stage, stage + 1) for stage in range(stages - 1)]
    return [Route("activation", *pair) for pair in pairs] + [Route("gradient", *pair[::-1]) for pair in pairs]


@dataclass(frozen=True)
class Receipt:
    """A message under way; `wait` gives it."""

    buffer: Tensor
    work: dist.Work
    peer: int

    def wait(self) -> Tensor:
        """Return the tensor once it is there. Raises RuntimeError when the peer is gone or the time-out passes."""
        with progress.waiting(self.peer):
            self.work.wait()
        return self.buffer


class Channel:
    """One direction of messages with one neighbour, in the order of sending."""

    def __init__(self, group: dist.ProcessGroup, peer: int, most_in_flight: int) -> None:
        """Talk to global rank `peer` of `group`; hold at most `most_in_flight` sent tensors that it has not taken."""
        self.group = group
        self.peer = peer
        self.most_in_flight = most_in_flight
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        """Start to send x (any shape and dtype; it must not be changed until the peer has it).

        The tensor and its handle are kept until the peer has taken the message: a freed buffer could be filled anew
        while it is still being read. Gloo tells that a send is complete only when waited for, so with
        `most_in_flight` messages open this waits for the oldest.
        """
        while self._sent and (len(self._sent) >= self.most_in_flight or self._sent[0][0].is_completed()):
            self._await_oldest()
        message = x.detach().contiguous()
        work = dist.isend(message, self.peer, group=self.group)
        assert work is not None, f"this rank is not in the group of rank {self.peer}"
        self._sent.append((work, message))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Receipt:
        """Start to receive the next message, which must have this shape and dtype."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(buffer, self.peer, group=self.group)
        assert work is not None, f"this rank is not in the group of rank {self.peer}"
        return Receipt(buffer, work, self.peer)

    def drain(self) -> None:
        """Wait until the peer has taken all that was sent."""
        while self._sent:
            self._await_oldest()

    def _await_oldest(self) -> None:
        with progress.waiting(self.peer):
            self._sent.popleft()[0].wait()


class StageLinks:
    """The channels of one pipeline stage along the routes that begin or end there (None: those of `chain`).

    A stage may run ahead of its neighbour by `most_in_flight` messages, as many as there are stages if nothing else is
    said; a schedule knows how many it takes, so that no stage waits for one that waits for it.
    """

    def __init__(self, mesh: ParallelMesh, routes: Iterable[Route] | None = None) -> None:
        """Open the channels of this rank of `mesh`; all ranks of the pipeline axis must call, with the same routes."""
        self.device = mesh.device
        own = mesh.coordinates.pipeline
        self._out: dict[tuple[Cargo, int], Channel] = {}
        self._in: dict[tuple[Cargo, int], Channel] = {}
        routes = list(chain(mesh.layout.pipeline) if routes is None else routes)
        for goes_up, cargo in product((True, False), CARGOES):
            ways = [route for route in routes if route.cargo == cargo and (route.sender < route.receiver) is goes_up]
            if not ways:
                continue
            group = mesh.message_group(cargo, goes_up)
            for route in dict.fromkeys(ways):
                if own in (route.sender, route.receiver):
                    there, channels = (route.receiver, self._out) if own == route.sender else (route.sender, self._in)
                    channels[cargo, there] = Channel(group, mesh.stage_rank(there), mesh.layout.pipeline)
            self._meet(cargo, goes_up, own)

    def _meet(self, cargo: Cargo, goes_up: bool, own: int) -> None:
        """Send each neighbour of a group a number, then take theirs.

        NCCL connects a pair at its first message and holds both hosts until it has. A receive that is posted ahead
        would then wait for a neighbour that itself waits for this rank's next activation (under GPipe it does). A group
        has messages of one direction only, so one end of the pipeline has nothing to send, and frees the next.
        """
        number = torch.zeros(1, device=self.device)
        for (sent, there), channel in self._out.items():
            if sent == cargo and (own < there) is goes_up:
                channel.send(number)
        for (sent, there), channel in self._in.items():
            if sent == cargo and (there < own) is goes_up:
                channel.receive((1,), number.dtype, self.device).wait()
        self.drain()

    def allow(self, most_in_flight: int) -> None:
        """Hold at most so many sent tensors for each neighbour from now on."""
        for channel in self._out.values():
            channel.most_in_flight = most_in_flight

    def send(self, cargo: Cargo, stage: int, x: Tensor) -> None:
        """Start to send an activation or a gradient to a stage."""
        channel = self._out.get((cargo, stage))
        assert channel is not None, f"this stage sends no {cargo} to stage {stage}"
        channel.send(x)

    def receive(self, cargo: Cargo, stage: int, shape: tuple[int, ...], dtype: torch.dtype) -> Receipt:
        """Start to receive a stage's next activation or gradient."""
        channel = self._in.get((cargo, stage))
        assert channel is not None, f"this stage gets no {cargo} from stage {stage}"
        return channel.receive(shape, dtype, self.device)

    def drain(self) -> None:
        """Wait until the neighbours have taken all that was sent; called at the end of a step."""
        for channel in self._out.values():
            channel.drain()
