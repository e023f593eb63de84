"""Activations to the next pipeline stage and gradients to the previous one, without waiting.

Sizes are known on both sides beforehand, so no header travels. `pipeline_parallel` decides the order of messages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import progress


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
    """The channels of one pipeline stage; those that lead off the ends of the pipeline do not exist.

    A stage may run ahead of its neighbour by as many messages as there are stages: under GPipe and 1F1B no stage then
    ever waits for one that waits for it. A schedule that runs further ahead says so by `most_in_flight`.
    """

    def __init__(self, mesh: ParallelMesh, most_in_flight: int | None = None) -> None:
        """Open the channels of this rank of `mesh`."""
        self.device = mesh.device
        limit = mesh.layout.pipeline if most_in_flight is None else most_in_flight
        previous, following = mesh.previous_rank, mesh.next_rank
        self._activations_in = None if previous is None else Channel(mesh.forward_group, previous, limit)
        self._activations_out = None if following is None else Channel(mesh.forward_group, following, limit)
        self._gradients_in = None if following is None else Channel(mesh.backward_group, following, limit)
        self._gradients_out = None if previous is None else Channel(mesh.backward_group, previous, limit)
        self._meet()

    def _meet(self) -> None:
        """Exchange a number with each neighbour in both directions; the neighbours must do the same.

        NCCL connects a pair at its first message and holds both hosts until it has. A receive that is posted ahead
        would then wait for a neighbour that itself waits for this rank's next activation (under GPipe it does).
        """
        number = torch.zeros(1, device=self.device)
        if self._activations_out is not None:
            self.send_forward(number)
        if self._activations_in is not None:
            self.receive_forward((1,), number.dtype).wait()
        if self._gradients_out is not None:
            self.send_backward(number)
        if self._gradients_in is not None:
            self.receive_backward((1,), number.dtype).wait()
        self.drain()

    def send_forward(self, activation: Tensor) -> None:
        """Start to send an activation to the next stage."""
        _existing(self._activations_out, "next").send(activation)

    def receive_forward(self, shape: tuple[int, ...], dtype: torch.dtype) -> Receipt:
        """Start to receive the previous stage's next activation."""
        return _existing(self._activations_in, "previous").receive(shape, dtype, self.device)

    def send_backward(self, gradient: Tensor) -> None:
        """Start to send a gradient to the previous stage."""
        _existing(self._gradients_out, "previous").send(gradient)

    def receive_backward(self, shape: tuple[int, ...], dtype: torch.dtype) -> Receipt:
        """Start to receive the gradient of the next activation from the next stage."""
        return _existing(self._gradients_in, "next").receive(shape, dtype, self.device)

    def drain(self) -> None:
        """Wait until the neighbours have taken all that was sent; called at the end of a step."""
        for channel in (self._activations_out, self._gradients_out):
            if channel is not None:
                channel.drain()


def _existing(channel: Channel | None, which: str) -> Channel:
    assert channel is not None, f"this stage has no {which} stage"
    return channel
