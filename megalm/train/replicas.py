"""Silent corruption: what data ranks hold alike is compared now and then, bit for bit, and who differs is named.

Each rank adds up the words of every tensor, wrapping around at 2^64: one flipped bit always changes that sum, by a
power of two. One reduction finds the least and the greatest of a data group's sums, 16 bytes a tensor; where they
differ the ranks' own sums are gathered and held against the majority.
Sources: Dixit et al. 2021 (silent data corruption at scale); Megatron-LM compares hashes of replicas likewise.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.collectives import agree, all_reduce_max
from megalm.distributed.exchange import broadcast_json, gather_json
from megalm.distributed.layout import Axis
from megalm.distributed.mesh import world_group
from megalm.errors import CorruptionError
from megalm.train.trainer import StepResult, Trainer

_CHUNK = 1 << 24  # elements that are widened to 64 bits at once: 128 MiB
_TOLD = 4  # tensors that an error names at most


class CompareReplicas:
    """Compare the data ranks' replicas every `every` steps (0: never) and at the end; stop where they differ."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._equal_at = -1

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Compare where the step is a multiple of `every`."""
        if self.every and trainer.state.step % self.every == 0:
            self.ensure_equal(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Compare what is saved and evaluated last."""
        self.ensure_equal(trainer)

    def ensure_equal(self, trainer: Trainer) -> None:
        """Compare what this step has left, unless that was done: also before it is saved."""
        if self.every and self._equal_at != trainer.state.step:
            compare(trainer)
            self._equal_at = trainer.state.step


def compare(trainer: Trainer) -> None:
    """Raise CorruptionError on every rank of the world if replicas differ over any data group. Every rank calls."""
    if trainer.mesh.size("replica") == 1:
        return
    axes: tuple[Axis, ...] = ("replica", "expert_replica")
    errors = [_difference(trainer, axis) for axis in axes]
    agree(next(filter(None, errors), None), world_group())


def _difference(trainer: Trainer, axis: Axis) -> CorruptionError | None:
    """Return what differs over the groups along an axis, whose ranks all call, as an error; None: nothing does."""
    group = trainer.mesh.group(axis)
    named = list(trainer.engine.replicas(axis))
    error = None
    if named and group.size() > 1:
        sums = torch.stack([checksum(tensor) for _, tensor in named])
        greatest, least = all_reduce_max(torch.stack((sums, ~sums)), group)  # ~ turns the order round, within 64 bits
        differ = (greatest != ~least).nonzero().flatten()[:_TOLD]
        if len(differ):
            gathered = sums.new_empty(group.size() * len(differ))
            dist.all_gather_into_tensor(gathered, sums[differ], group=group)
            found = odd_ones_out(gathered.view(-1, len(differ)).tolist(), [named[i][0] for i in differ.tolist()])
            hosts: list[str] = broadcast_json(gather_json(socket.gethostname(), group), group)
            ranks = [f"rank {r} on {h}" for r, h in zip(dist.get_process_group_ranks(group), hosts, strict=True)]
            lines = [f"{' and '.join(ranks[i] for i in members)} in {what}" for members, what in found]
            error = CorruptionError(
                f"step {trainer.state.step}: replicas differ: {'; '.join(lines)}; memory or arithmetic of that GPU is "
                "not to be trusted: exclude its node and start again from the last checkpoint"
            )
    return error


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the words of a tensor, of 1, 2 or 4 bytes, or of the halves of longer ones: 0-dim int64."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in words.split(_CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


def odd_ones_out(sums: Sequence[Sequence[int]], names: Sequence[str]) -> list[tuple[list[int], str]]:
    """Return, for each tensor that replicas (the rows) do not agree on, the indices of those off the majority.

    Where no value has a majority, as with two replicas, that is all of them.
    """
    found = []
    for name, values in zip(names, zip(*sums, strict=True), strict=True):
        (most, count), *_ = Counter(values).most_common(1)
        if count < len(values):
            majority = 2 * count > len(values)
            found.append(([i for i, value in enumerate(values) if not majority or value != most], name))
    return found
