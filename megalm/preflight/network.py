"""Clocks, links and collectives between ranks, measured over a process group.

Every rank of the group must call each `measure_` function; sizes follow from what was measured before, so a slow
network costs little more time than a fast one. `judge.py` and `cluster.py` say what the figures mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from megalm.errors import DistributedError

Clock = Callable[[], float]

_FIRST_BYTES = 2**18
_MOST_BYTES = 2**25
_PAIR_TIME_S = 0.25
_MOST_ROUNDS = 31
_PINGS, _CLOCK_ROUNDS = 12, 8
ALL_REDUCE_BYTES = (2**12, 2**20, 2**24)
_ALL_REDUCE_TIME_S = 1.0


@dataclass(frozen=True)
class Link:
    """What two nodes measured together: seconds for one small message one way, bytes a second of large ones."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Skew:
    """A clock ahead of rank 0's by `offset_s`, which is wrong by at most `error_s`."""

    offset_s: float
    error_s: float


def tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of disjoint pairs such that each two of `count` players meet once.

    count - 1 rounds, count if that is odd. The circle method: one player stands, the others move on by one place
    after each round.
    """
    players = list(range(count)) + ([-1] if count % 2 else [])
    size = len(players)
    for _ in range(size - 1 if count > 1 else 0):
        pairs = [(players[place], players[size - 1 - place]) for place in range(size // 2)]
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        players = [players[0], players[-1], *players[1:-1]]


class Peer:
    """Messages between this rank and one other of the group."""

    def __init__(self, rank: int, group: dist.ProcessGroup, device: torch.device, name: str = "") -> None:
        """`rank` is the other's, global; messages live on `device`."""
        self.rank, self.group, self.device, self.name = rank, group, device, name or f"rank {rank}"

    def send(self, tensor: torch.Tensor) -> None:
        """Send and wait until the tensor may be used again."""
        self._named(lambda: dist.send(tensor, self.rank, group=self.group))

    def receive(self, tensor: torch.Tensor) -> None:
        """Receive into the tensor and wait for it."""
        self._named(lambda: dist.recv(tensor, self.rank, group=self.group))

    def _named(self, work: Callable[[], object]) -> None:
        try:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise DistributedError(f"no message passes between this rank and {self.name} ({reason})") from error

    def buffer(self, count: int) -> torch.Tensor:
        """Return a tensor of `count` bytes for messages."""
        return torch.zeros(count, dtype=torch.uint8, device=self.device)


def measure_link(peer: Peer, leads: bool) -> Link:
    """Return latency and bandwidth of the pair, as its leader sees it; both must call, one of them as leader.

    Latency is half of the quickest of some round trips. Bandwidth is that of the quickest transfer there and back: of
    256 KiB, and of a size that takes 0.25 s at that rate, at most 32 MiB, which the leader tells.
    """
    small = peer.buffer(8)
    latency_s = min(_round_trip(peer, small, leads) for _ in range(_PINGS)) / 2
    first = peer.buffer(_FIRST_BYTES)
    trip_s = min(_round_trip(peer, first, leads) for _ in range(2))
    best = 2 * _FIRST_BYTES / trip_s
    size = torch.tensor([int(min(best * _PAIR_TIME_S / 4, _MOST_BYTES))], dtype=torch.int64, device=peer.device)
    peer.send(size) if leads else peer.receive(size)
    if (count := int(size.item())) > 2 * _FIRST_BYTES:
        large = peer.buffer(count)
        best = max(best, 2 * count / min(_round_trip(peer, large, leads) for _ in range(2)))
    return Link(latency_s, best)


def _round_trip(peer: Peer, message: torch.Tensor, leads: bool) -> float:
    """Send a message there and back; return the seconds that it took."""
    begin = time.perf_counter()
    if leads:
        peer.send(message)
        peer.receive(message)
    else:
        peer.receive(message)
        peer.send(message)
    return max(time.perf_counter() - begin, 1e-9)


def measure_links(
    nodes: Sequence[Sequence[int]],
    names: Sequence[str],
    group: dist.ProcessGroup,
    device: torch.device,
    measure: Callable[[Peer, bool], Link] = measure_link,
) -> dict[tuple[int, int], Link]:
    """Return the links of this rank to those of other nodes by both nodes' positions in `nodes`, the led ones only.

    `nodes` holds the ranks of each node that take part, `names` how messages call the nodes. The n-th ranks of two
    nodes measure with each other, all at the same time: what the two can do together, on every network card. Each round
    joins disjoint pairs of nodes and all ranks of the group wait for its end, so that no pair is disturbed by those of
    another round. Of more than 32 nodes each meets 31 others only.
    """
    me = dist.get_rank()
    places = {rank: (position, rail) for position, ranks in enumerate(nodes) for rail, rank in enumerate(ranks)}
    position, rail = places.get(me, (-1, -1))
    links = {}
    for pairs in islice(tournament(len(nodes)), _MOST_ROUNDS):
        for first, second in pairs:
            if position in (first, second) and rail < min(len(nodes[first]), len(nodes[second])):
                leads = position == first
                other = second if leads else first
                link = measure(Peer(nodes[other][rail], group, device, names[other]), leads)
                if leads:
                    links[first, second] = link
        _meet(group)
    return links


def measure_clocks(
    players: Sequence[int], group: dist.ProcessGroup, clock: Clock = time.time, rounds: int = _CLOCK_ROUNDS
) -> dict[int, Skew]:
    """Return on the first player the skew of each other player's clock by its position; elsewhere an empty dict.

    Cristian's midpoint method: a clock that is read between sending at t0 and receiving at t1 was read at (t0 + t1) / 2
    to within half of the delay; the round with the least delay counts. One player after another, CPU tensors.
    """
    me, cpu = dist.get_rank(), torch.device("cpu")
    skews = {}
    for position, rank in enumerate(players):
        if position == 0:
            skews[0] = Skew(0.0, 0.0)
        elif me == players[0]:
            peer = Peer(rank, group, cpu)
            skews[position] = min((_ask(peer, clock) for _ in range(rounds)), key=lambda skew: skew.error_s)
        elif me == rank:
            peer, now = Peer(players[0], group, cpu), torch.zeros(1, dtype=torch.float64)
            for _ in range(rounds):
                peer.receive(now)
                now.fill_(clock())
                peer.send(now)
    return skews if me == players[0] else {}


def _ask(peer: Peer, clock: Clock) -> Skew:
    now = torch.zeros(1, dtype=torch.float64)
    sent = clock()
    peer.send(now)
    peer.receive(now)
    received = clock()
    return Skew(float(now.item()) - (sent + received) / 2, (received - sent) / 2)


def measure_all_reduce(group: dist.ProcessGroup, device: torch.device) -> dict[int, float]:
    """Return the bus bandwidth of an all-reduce in bytes/s by message size in bytes, the best of three each.

    Bus bandwidth is 2 (n - 1) / n times size over time: what each link carries, whatever the number of ranks (the
    convention of nccl-tests). Ends before a size that would take more than a second. Empty for a group of one.
    """
    count = group.size()
    found: dict[int, float] = {}
    previous, seconds = 0, 0.0
    for size in ALL_REDUCE_BYTES if count > 1 else ():
        # Of a small message the latency is most: a larger one takes less time than their sizes say.
        if previous and seconds * min(size / previous, 16) > _ALL_REDUCE_TIME_S:
            break
        x = torch.zeros(size // 4, device=device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            dist.all_reduce(x, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        # The first one connects. All ranks must see the same time, as it decides on what comes next.
        slowest = torch.tensor([min(times[1:])], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        previous, seconds = size, max(float(slowest.item()), 1e-9)
        found[size] = 2 * (count - 1) / count * size / seconds
    return found


def _meet(group: dist.ProcessGroup) -> None:
    dist.barrier(group=group)
