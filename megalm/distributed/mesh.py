"""The process groups of a running rank: one for each axis of the mesh.

Layers and engines take their group from here as an argument and never look one up. `layout.py` holds the
arithmetic, `launch.py` the start of the world itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist

from megalm.distributed.layout import AXES, Axis, Coordinates, RankLayout
from megalm.errors import LaunchError

DEFAULT_COLLECTIVE_TIMEOUT_S = 600

Cargo = Literal["activation", "gradient"]
"""What pipeline stages send to each other."""
CARGOES: tuple[Cargo, ...] = get_args(Cargo)


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's place and its groups. A group of one rank is valid on every axis.

    `forward_group` and `backward_group` hold the ranks of the pipeline axis once more each: activations travel
    through the one and gradients through the other, so that messages within each arrive in the order of sending and
    neither direction waits for the other (NCCL runs the messages of one group in one queue). `message_group` has them,
    and those for schedules whose activations travel down too, or whose gradients travel up.
    """

    layout: RankLayout
    rank: int
    device: torch.device
    groups: dict[Axis, dist.ProcessGroup] = field(repr=False)
    forward_group: dist.ProcessGroup = field(repr=False)
    backward_group: dist.ProcessGroup = field(repr=False)
    collective_timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S
    _returning: dict[Cargo, dist.ProcessGroup] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        layout: RankLayout,
        device: torch.device,
        collective_timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S,
    ) -> ParallelMesh:
        """Form this rank's groups. Every rank of the world must call, with the same layout.

        Raises LaunchError if the world has another size than the layout.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size != layout.world_size:
            raise LaunchError(
                f"the layout pipeline {layout.pipeline} x data {layout.data} x context {layout.context} x tensor "
                f"{layout.tensor} needs "
                f"{layout.world_size} processes, but {world_size} were started; start {layout.world_size}"
            )
        timeout = timedelta(seconds=collective_timeout_s)
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        groups: dict[Axis, dist.ProcessGroup] = {}
        for axis in AXES:
            # A stage between the first and the last has no part in the embedding: it gets a group of its own.
            ranks = tuple(layout.group_of(axis, rank) or [rank])
            # Axes with the same ranks, and the world, share one group and its connections. Not so the embedding of a
            # longer pipeline: every rank must form equally many groups, and only some ranks could share there.
            if ranks not in made or (axis == "embedding" and layout.pipeline > 2):
                made[ranks] = world_group() if len(ranks) == world_size else _new_group(ranks, timeout, axis)
            groups[axis] = made[ranks]
        stages = tuple(layout.group_of("pipeline", rank) or ())
        forward = backward = groups["pipeline"]
        if len(stages) > 1:
            forward, backward = (_new_group(stages, timeout, name) for name in ("forward", "backward"))
        return cls(layout, rank, device, groups, forward, backward, collective_timeout_s)

    @classmethod
    def on_meta(cls, layout: RankLayout, rank: int) -> ParallelMesh:
        """Return the mesh of a rank that does not run, in no world: what it holds can be built, but not computed with.

        A model lies on the meta device, with shapes and without memory; groups know their size and cannot communicate.
        """
        groups: dict[Axis, dist.ProcessGroup] = {}
        for axis in AXES:
            ranks = layout.group_of(axis, rank) or [rank]
            groups[axis] = dist.ProcessGroup(dist.HashStore(), ranks.index(rank), len(ranks))
        return cls(layout, rank, torch.device("meta"), groups, groups["pipeline"], groups["pipeline"])

    @property
    def coordinates(self) -> Coordinates:
        """Return this rank's index along each axis."""
        return self.layout.coordinates(self.rank)

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """Return the group along `axis`, see `RankLayout.group_of`."""
        return self.groups[axis]

    def size(self, axis: Axis) -> int:
        """Return the number of ranks in the group along `axis`."""
        return self.groups[axis].size()

    def index(self, axis: Axis) -> int:
        """Return this rank's index in the group along `axis`, from 0."""
        return self.groups[axis].rank()

    def replica_block(self, size: int) -> dist.ProcessGroup:
        """Form the group of the `size` neighbouring replicas among which this one is; every rank must call."""
        ranks = self.layout.group_of("replica", self.rank) or []
        assert size > 0 and len(ranks) % size == 0, f"blocks of {size} of {len(ranks)} replicas"
        first = self.index("replica") // size * size
        return _new_group(tuple(ranks[first : first + size]), timedelta(seconds=self.collective_timeout_s), "block")

    def message_group(self, cargo: Cargo, goes_up: bool) -> dist.ProcessGroup:
        """Return the group of all stages through which a cargo travels, to later stages or (not `goes_up`) to earlier.

        Activations that go down and gradients that go up have groups that are formed when they are first asked for:
        every rank of the world must then call, in the same order.
        """
        if goes_up is (cargo == "activation"):
            return self.forward_group if goes_up else self.backward_group
        if cargo not in self._returning:
            stages = tuple(self.layout.group_of("pipeline", self.rank) or ())
            timeout = timedelta(seconds=self.collective_timeout_s)
            self._returning[cargo] = _new_group(stages, timeout, f"returning {cargo}")
        return self._returning[cargo]

    def stage_rank(self, stage: int) -> int:
        """Return the global rank of another stage at this rank's data, context and tensor index."""
        at = self.coordinates
        return self.layout.rank(stage, at.data, at.tensor, at.context)

    @property
    def is_first_stage(self) -> bool:
        """Tell whether this rank is at the begin of the pipeline axis: it holds the embedding."""
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Tell whether this rank is at the end of the pipeline axis."""
        return self.coordinates.pipeline == self.layout.pipeline - 1

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.coordinates})"


def world_group() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    world = dist.group.WORLD
    assert world is not None, "no process group: call megalm.distributed.launch.start first"
    return world


def _new_group(ranks: tuple[int, ...], timeout: timedelta, name: str) -> dist.ProcessGroup:
    """Form one group; only its own members call.

    Without `use_local_synchronization` every rank would have to call new_group for every group of the axis: at 10,000
    ranks and tensor 8 that is 1,250 calls for each axis on each rank, and each notes its member list;
    `new_subgroups_by_enumeration` is the same loop. With it a rank forms its own groups only, a handful. It needs
    - the same order of axes on all ranks, which AXES gives: a rank is in one group of an axis, so no circle of waiting;
    - that members have formed equally many groups before: torch 2.13 names the group by a hash of its ranks and of that
      number, and members that arrive at different names wait for each other until the time-out;
    - communicators that are not split off the world's: launch.start binds no device_id to the world.
    """
    group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=name)
    return cast(dist.ProcessGroup, group)
