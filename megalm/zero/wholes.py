"""Matrices of which ranks have parts, put together at one rank each, worked on there, and given back in parts.

Tensor ranks have a shard each of a parameter, and under ZeRO the replicas any range of that shard. The owner of a
matrix is one of all these ranks: by cost the dearest first, each to the rank that has least to do, which follows from
shapes and layout alone. Parts travel in one flat buffer to each owner, first between replicas, then between tensor
ranks, and back the same way. Whose ranges an owner gets it is told once, so a rank knows of its own matrices only.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.zero.parts import Part

ROUND_ELEMENTS = 2**26
"""An owner puts about this many elements together at once, or one matrix."""


@dataclass(frozen=True)
class Slab:
    """Slice `index`, over the leading dims, of the parameter of part `part`: [rows, columns]."""

    part: int
    shard: ShardSpec
    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole."""
        rows, columns = self.shard.global_shape[-2:]
        return rows, columns

    @property
    def local_shape(self) -> tuple[int, int]:
        """Rows and columns of a tensor rank's shard, padding included."""
        rows, columns = self.shard.local_shape[-2:]
        return rows, columns

    @property
    def size(self) -> int:
        """Elements of a tensor rank's shard."""
        return prod(self.local_shape)

    @property
    def split(self) -> int | None:
        """What tensor ranks have a shard each of: rows (0), columns (1), or each has it all (None)."""
        return None if self.shard.dim is None else self.shard.dim - len(self.shard.global_shape) + 2


class Owner(NamedTuple):
    """The rank, among those of a pipeline stage, at which a slab is put together."""

    replica: int
    tensor: int


class _Range(NamedTuple):
    """Elements [start, start + length) of this tensor rank's flattened shard of a slab."""

    slab: int
    start: int
    length: int


Compute = Callable[[Sequence[tuple[Slab, Tensor]]], Sequence[Tensor]]
"""Turns whole slabs into tensors of the same shapes."""


class Wholes:
    """The slabs of some parameters, their owners, and who has what of them.

    Every rank of the replica and tensor groups must make it, with the same parameters in the same order, and call
    `transform`. `divided`: the replicas have other ranges each. `axis` is that of the replicas, "expert_replica" where
    the parameters are of experts that ranks divide.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        mesh: ParallelMesh,
        divided: bool,
        cost: Callable[[Slab], float],
        axis: Axis = "replica",
    ) -> None:
        self.mesh, self.axis = mesh, axis
        self.divided = divided and mesh.size(axis) > 1
        self.at = Owner(mesh.index(axis), mesh.index("tensor"))
        self.slabs = list(_slabs(parts))
        tensor = mesh.size("tensor")
        self.owners = [Owner(*divmod(n, tensor)) for n in deal(list(map(cost, self.slabs)), mesh.size(axis) * tensor)]
        self.rounds = _rounds(self.slabs, self.owners)
        self._firsts = [part.start for part in parts]
        self._own = {r.slab: r for r in _ranges(parts, self.slabs) if r.length}
        self._others: list[list[_Range]] = self._told() if self.divided else []

    @torch.no_grad()
    def transform(self, values: Sequence[Tensor], dtype: torch.dtype, compute: Compute) -> None:
        """Replace each part's values (1-D, as long as the part) by those of the slabs that `compute` makes in `dtype`.

        It computes on the mesh's device, wherever the values are.
        """
        like = torch.empty(0, dtype=dtype, device=self.mesh.device)
        for chosen in self.rounds:
            here = [slab for slab in chosen if self.owners[slab].replica == self.at.replica]
            local = self._collect(values, chosen, here, like)
            wholes = self._join(local, here, like)
            results = compute([(self.slabs[slab], whole) for slab, whole in wholes.items()])
            local = self._part(dict(zip(wholes, results, strict=True)), here, like)
            self._spread(values, local, chosen, here, like)

    def _told(self) -> list[list[_Range]]:
        """Return, for each replica, the ranges that it has of slabs whose owner is of this rank's replica index."""
        group, device = self.mesh.group(self.axis), self.mesh.device
        told: list[list[int]] = [[] for _ in range(group.size())]
        for slab, own in self._own.items():
            told[self.owners[slab].replica] += own
        counts = torch.tensor([len(numbers) for numbers in told], device=device)
        expected = torch.empty_like(counts)
        dist.all_to_all_single(expected, counts, group=group)
        outgoing = [[torch.tensor(numbers, dtype=torch.int64, device=device)] for numbers in told]
        came = _exchange(outgoing, [[count] for count in expected.tolist()], group, counts[:0])
        return [[_Range(*triple) for triple in numbers.view(-1, 3).tolist()] for (numbers,) in came]

    def _collect(
        self, values: Sequence[Tensor], chosen: Sequence[int], here: Sequence[int], like: Tensor
    ) -> dict[int, Tensor]:
        """Return this tensor rank's shards [size] of the slabs whose owner is of this rank's replica index."""
        if not self.divided:
            return {slab: self._values(values, slab).to(like) for slab in here}
        group = self.mesh.group(self.axis)
        outgoing: list[list[Tensor]] = [[] for _ in range(group.size())]
        for slab in chosen:
            if slab in self._own:
                outgoing[self.owners[slab].replica].append(self._values(values, slab).to(like))
        theirs = self._of_round(chosen)
        sizes = [[r.length for r in ranges] for ranges in theirs]
        came = _exchange(outgoing, sizes, group, like)
        local = {slab: like.new_empty(self.slabs[slab].size) for slab in here}
        for r, piece in zip(chain(*theirs), chain(*came), strict=True):
            local[r.slab][r.start : r.start + r.length] = piece
        return local

    def _join(self, local: dict[int, Tensor], here: Sequence[int], like: Tensor) -> dict[int, Tensor]:
        """Return the whole slabs that this rank owns."""
        group, own = self.mesh.group("tensor"), [slab for slab in here if self.owners[slab] == self.at]
        outgoing: list[list[Tensor]] = [[] for _ in range(group.size())]
        for slab in here:
            owner = self.owners[slab].tensor
            if self.slabs[slab].split is not None or owner == self.at.tensor:
                outgoing[owner].append(local[slab])
        senders = [
            [slab for slab in own if self.slabs[slab].split is not None or rank == self.at.tensor]
            for rank in range(group.size())
        ]
        sizes = [[self.slabs[slab].size for slab in sent] for sent in senders]
        came = _exchange(outgoing, sizes, group, like)
        shards: dict[int, list[Tensor]] = {slab: [] for slab in own}
        for slab, shard in zip(chain(*senders), chain(*came), strict=True):
            shards[slab].append(shard.view(self.slabs[slab].local_shape))
        return {slab: _joined(self.slabs[slab], found) for slab, found in shards.items()}

    def _part(self, results: dict[int, Tensor], here: Sequence[int], like: Tensor) -> dict[int, Tensor]:
        """Return this tensor rank's shards [size] of the results of the owners of this rank's replica index."""
        group = self.mesh.group("tensor")
        outgoing: list[list[Tensor]] = [[] for _ in range(group.size())]
        for slab, result in results.items():
            for rank, shard in enumerate(_shards(self.slabs[slab], result.to(like), group.size())):
                outgoing[rank].append(shard.reshape(-1))
        senders = [[slab for slab in here if self.owners[slab].tensor == rank] for rank in range(group.size())]
        sizes = [[self.slabs[slab].size for slab in sent] for sent in senders]
        came = _exchange(outgoing, sizes, group, like)
        return dict(zip(chain(*senders), chain(*came), strict=True))

    def _spread(
        self,
        values: Sequence[Tensor],
        local: dict[int, Tensor],
        chosen: Sequence[int],
        here: Sequence[int],
        like: Tensor,
    ) -> None:
        """Give the replicas what they have of the slabs of this round."""
        group = self.mesh.group(self.axis)
        if self.divided:
            outgoing = [[local[r.slab][r.start : r.start + r.length] for r in each] for each in self._of_round(chosen)]
            owned = [
                [slab for slab in chosen if slab in self._own and self.owners[slab].replica == rank]
                for rank in range(group.size())
            ]
            sizes = [[self._own[slab].length for slab in slabs] for slabs in owned]
            came = _exchange(outgoing, sizes, group, like)
            local = dict(zip(chain(*owned), chain(*came), strict=True))
        elif group.size() > 1:  # all ranks get all: a sum costs the same among many ranks as among few
            sizes_here = [self.slabs[slab].size for slab in chosen]
            flat = like.new_zeros(sum(sizes_here))
            all_local = dict(zip(chosen, flat.split(sizes_here), strict=True))
            for slab in here:
                all_local[slab].copy_(local[slab])
            dist.all_reduce(flat, group=group)
            local = all_local
        for slab, result in local.items():
            self._values(values, slab).copy_(result)

    def _values(self, values: Sequence[Tensor], slab: int) -> Tensor:
        """Return the view of a slab's range in its part's values."""
        own, shape = self._own[slab], self.slabs[slab]
        start = shape.index * shape.size + own.start - self._firsts[shape.part]
        return values[shape.part][start : start + own.length]

    def _of_round(self, chosen: Sequence[int]) -> list[list[_Range]]:
        """Return what each data rank has of this round's slabs that are put together at this rank's data index."""
        among = set(chosen)
        return [[r for r in ranges if r.slab in among] for ranges in self._others]


def deal(costs: Sequence[float], owners: int) -> list[int]:
    """Return an owner, from 0, for each piece of work: the dearest first, each to whom has least."""
    dealt = [0] * len(costs)
    loads = [(0.0, owner) for owner in range(min(owners, len(costs)))]
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        load, owner = loads[0]
        dealt[piece] = owner
        heapq.heapreplace(loads, (load + costs[piece], owner))
    return dealt


def _slabs(parts: Sequence[Part]) -> Iterator[Slab]:
    for index, part in enumerate(parts):
        shard = part.shard
        leading = len(shard.global_shape) - 2
        assert leading >= 0 and (shard.dim is None or shard.dim >= leading), f"{shard}: no matrices, or split between"
        for at in range(prod(shard.local_shape[:leading])):  # of experts, those that are held here
            yield Slab(index, shard, at)


def _ranges(parts: Sequence[Part], slabs: Sequence[Slab]) -> Iterator[_Range]:
    """Yield what this rank has of each slab."""
    for number, slab in enumerate(slabs):
        part, first = parts[slab.part], slab.index * slab.size
        start = min(max(part.start, first), first + slab.size)
        stop = max(start, min(part.start + part.length, first + slab.size))
        yield _Range(number, start - first, stop - start)


def _rounds(slabs: Sequence[Slab], owners: Sequence[Owner]) -> list[list[int]]:
    """Return slabs that are worked on together, none of an owner's rounds larger than it has memory for."""
    rounds: list[list[int]] = []
    filled: dict[Owner, tuple[int, int]] = {}
    for number, (slab, owner) in enumerate(zip(slabs, owners, strict=True)):
        at, elements = filled.get(owner, (0, 0))
        if elements and elements + prod(slab.shape) > ROUND_ELEMENTS:
            at, elements = at + 1, 0
        filled[owner] = (at, elements + prod(slab.shape))
        if at == len(rounds):
            rounds.append([])
        rounds[at].append(number)
    return rounds


def _joined(slab: Slab, shards: Sequence[Tensor]) -> Tensor:
    """Return the whole of a slab, without padding, from the tensor ranks' shards; of those that have it all, one."""
    if slab.split is None:
        return shards[0]
    return torch.cat(list(shards), dim=slab.split).narrow(slab.split, 0, slab.shape[slab.split])


def _shards(slab: Slab, whole: Tensor, ranks: int) -> Sequence[Tensor]:
    """Return what each tensor rank has of a slab."""
    if slab.split is None:
        return [whole] * ranks
    local = slab.local_shape[slab.split]
    padding = local * ranks - whole.shape[slab.split]
    if padding:
        last = (0, 0) if slab.split == 0 else ()
        whole = torch.nn.functional.pad(whole, (*last, 0, padding))
    return whole.split(local, dim=slab.split)


def _exchange(
    outgoing: Sequence[list[Tensor]], sizes: Sequence[Sequence[int]], group: dist.ProcessGroup, like: Tensor
) -> list[list[Tensor]]:
    """Send each rank of a group its tensors (1-D, of the dtype and device of `like`); return those that came from each.

    `sizes` are theirs, by the sender.
    """
    if group.size() == 1:
        return list(outgoing)
    sent = torch.cat([like[:0], *chain(*outgoing)])
    expected = [sum(each) for each in sizes]
    received = sent.new_empty(sum(expected))
    dist.all_to_all_single(received, sent, expected, [sum(map(len, each)) for each in outgoing], group=group)
    return [list(flat.split(list(each))) for flat, each in zip(received.split(expected), sizes, strict=True)]
