"""Start and end of the world's process group, in bounded time.

`rendezvous.py` says which rank this is and where to meet; `mesh.py` forms the groups inside of the world. Here every
wait has a limit, and what goes wrong is one line that says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megalm.distributed.rendezvous import Rendezvous, rank_nodes
from megalm.distributed.time_limit import within
from megalm.errors import AbsentRanks, DistributedError, LaunchError

EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that `start` sets."""

_ALONE = Rendezvous(0, 1, 0, 1, "127.0.0.1", 29500, "none")
_LINGER_S = 2.0  # rank 0 holds the store: how long the others may still read why it gives up
_POLL_S = 0.1  # 10,000 ranks ask the store 100,000 times a second at most, and only until all are there
_LEAVE_TIMEOUT_S = 10.0
_NAMED_RANKS = 8


def start(
    rendezvous: Rendezvous | None,
    device_type: str,
    start_timeout_s: float = 60,
    collective_timeout_s: float = 600,
) -> None:
    """Form the world's process group; all ranks must call. None: a world of one, which needs no port.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for libraries that read them. Back ends: gloo for
    CPU tensors, with device_type "cuda" NCCL besides for CUDA tensors. Raises DistributedError when the port is taken
    or a rank does not arrive within `start_timeout_s`, LaunchError when the ranks disagree on who they are.
    """
    assert not dist.is_initialized(), "the process group was started already"
    # torch 2.13 renames collectives that we and DeepSpeed call by the names which 2.11 has too.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    place = rendezvous or _ALONE
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    deadline = time.monotonic() + start_timeout_s
    if place.world_size == 1:
        store: dist.Store = dist.HashStore()
    else:
        meeting = _open_store(place, start_timeout_s, deadline)
        store = dist.PrefixStore(f"megalm/{place.attempt}", meeting)
        _await_all(store, place, start_timeout_s, deadline)

    def form() -> None:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=collective_timeout_s),
        )

    # All ranks are there, so this is quick unless they cannot connect to each other.
    limit_s = max(5.0, deadline - time.monotonic())
    try:
        within(limit_s, form)
    except (TimeoutError, RuntimeError) as error:
        raise DistributedError(
            f"all {place.world_size} ranks arrived at {place.address}:{place.port}, but rank {place.rank} could not "
            f"connect to the others within {limit_s:.0f} s ({_one_line(error)}); set GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the network interface that joins the nodes"
        ) from error


def stop(failed: bool = False) -> None:
    """Destroy all groups. Does nothing where none is; returns within some 20 s even if peers are dead or hang.

    After success all ranks call, and leave together; a rank that failed passes `failed=True` and waits for nobody.
    """
    if not dist.is_initialized():
        return
    if not failed and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):  # a dead peer or store: nobody left to wait for
            _leave_together(dist.get_world_size())
    # NCCL waits for running collectives when a group is destroyed; after a failure those never end.
    abort = failed and "nccl" in str(dist.get_backend_config())
    end = dist.distributed_c10d._abort_process_group if abort else dist.destroy_process_group
    with contextlib.suppress(TimeoutError, RuntimeError):
        within(_LEAVE_TIMEOUT_S, end)


def local_device(rendezvous: Rendezvous | None, device_type: str) -> torch.device:
    """Return this rank's device and make it the current one. LaunchError if the node has fewer GPUs than ranks."""
    if device_type != "cuda":
        return torch.device(device_type)
    place, count = rendezvous or _ALONE, torch.cuda.device_count()
    # srun --gpus-per-task and the like show each rank one GPU, its own.
    bound = count == 1 and place.launcher in ("srun", "mpirun") and "CUDA_VISIBLE_DEVICES" in os.environ
    index = 0 if bound else place.local_rank
    if index >= count:
        raise LaunchError(
            f"local rank {place.local_rank} has no GPU of its own: {count} visible; start at most {count} processes "
            "a node, give each its own by srun --gpus-per-task=1, or set run.device=cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error is what torch raises in a collective when a peer died or hangs."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


@contextlib.contextmanager
def peer_errors(who: str) -> Iterator[None]:
    """Turn what torch raises in a collective when a peer died or hangs into a DistributedError; `who` is this rank."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise DistributedError(
            f"{who} lost a peer ({_one_line(error)}); look for the first error in the other ranks' logs"
        ) from error


def _open_store(place: Rendezvous, start_timeout_s: float, deadline: float) -> dist.Store:
    """Return a connection to rank 0's store; on rank 0 open it."""
    where = f"{place.address}:{place.port}"
    hosts = place.rank == 0 and not place.agent_store
    listener = _listen(place) if hosts else None

    def connect() -> dist.Store:
        return dist.TCPStore(
            place.address,
            place.port,
            is_master=hosts,
            timeout=timedelta(seconds=start_timeout_s),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )

    try:
        if not hosts:
            _await_listener(place, deadline)
        # Where another program listens but never answers, torch's own limit does not hold.
        return within(deadline - time.monotonic(), connect)
    except (TimeoutError, RuntimeError) as error:
        raise DistributedError(
            f"rank {place.rank} of {place.world_size} could not reach rank 0 at {where} within "
            f"{start_timeout_s:.0f} s; see whether rank 0 runs there, whether another program holds the port "
            "(then choose another MASTER_PORT) and whether a firewall lies between"
        ) from error


def _await_listener(place: Rendezvous, deadline: float) -> None:
    """Return once something accepts connections at the meeting point; TimeoutError at the deadline.

    torch would wait up to twice its limit here and log a stack of C++ frames.
    """
    while True:
        try:
            left_s = max(0.1, deadline - time.monotonic())
            socket.create_connection((place.address, place.port), timeout=left_s).close()
            return
        except OSError as error:  # nobody listens yet, or the name is not known yet
            if time.monotonic() + _POLL_S > deadline:
                raise TimeoutError(str(error)) from error
            time.sleep(_POLL_S)


def _listen(place: Rendezvous) -> socket.socket:
    """Return a socket that listens at the meeting point.

    It is bound to the job's own interface, since the store asks nobody who he is. A host name that leads to the
    loopback on its own host (as Debian's /etc/hosts has it), or an address that is translated on its way here, leaves
    no interface to choose: then all of them.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise DistributedError(
            f"the host {place.address} of rank 0 has no address ({error.strerror}); set MASTER_ADDR to one that the "
            "nodes know"
        ) from error
    loops_back = str(target[0]).startswith("127.") or target[0] == "::1"
    named = place.address not in ("localhost", target[0])
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    everywhere = ("", place.port)
    try:
        try:
            listener.bind(everywhere if loops_back and named else target)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            listener.bind(everywhere)
        listener.listen(min(4096, max(128, 2 * place.world_size)))
    except OSError as error:
        listener.close()
        raise DistributedError(
            f"rank 0 cannot listen at {place.address}:{place.port} ({error.strerror}); another program holds the port: "
            "choose another MASTER_PORT"
        ) from error
    return listener


def _await_all(store: dist.Store, place: Rendezvous, start_timeout_s: float, deadline: float) -> None:
    """Return when all ranks have arrived and agree on the world's size."""
    where = f"{place.address}:{place.port}"
    ranks: tuple[int, ...] = ()
    try:
        trouble = _disagreement(store, place)
        if trouble:
            store.set("verdict", f"LaunchError {trouble}")
        elif store.add("arrived", 1) == place.world_size:
            store.set("verdict", "all")
        while not store.check(["verdict"]):  # store.wait would log warnings at its time-out
            if time.monotonic() > deadline:
                absence, ranks = _absence(store, place, start_timeout_s)
                if place.rank:
                    raise AbsentRanks(absence)
                store.set("verdict", f"AbsentRanks {absence}")  # rank 0 says it to all who wait
            time.sleep(_POLL_S)
        verdict = store.get("verdict").decode()
    except RuntimeError as error:
        raise DistributedError(
            f"rank 0 at {where} went away before all {place.world_size} processes had arrived; see its output"
        ) from error
    if verdict != "all":
        if place.rank == 0:
            time.sleep(_LINGER_S)
        kind, _, message = verdict.partition(" ")
        raise LaunchError(message) if kind == "LaunchError" else AbsentRanks(message, ranks)


def _absence(store: dist.Store, place: Rendezvous, start_timeout_s: float) -> tuple[str, tuple[int, ...]]:
    """Return what is known of the ranks that did not arrive, and on rank 0 their numbers."""
    count = store.add("arrived", 0)
    ranks = [] if place.rank else [rank for rank in range(place.world_size) if not store.check([f"rank/{rank}"])]
    missing = f"; missing {_named(ranks, rank_nodes(os.environ))}" if ranks else ""
    message = (
        f"{count} of {place.world_size} processes arrived at {place.address}:{place.port} within "
        f"{start_timeout_s:.0f} s{missing}; see the output of the others, or allow more by run.start_timeout_s"
    )
    return message, tuple(ranks)


def _disagreement(store: dist.Store, place: Rendezvous) -> str | None:
    size = store.compare_set("world_size", "", str(place.world_size)).decode()
    if size != str(place.world_size):
        return (
            f"rank {place.rank} was started in a world of {place.world_size}, another rank in one of {size}; "
            "give all processes the same WORLD_SIZE"
        )
    if store.add(f"rank/{place.rank}", 1) > 1:
        return (
            f"two processes take themselves for rank {place.rank} of {place.world_size}; give each a RANK of its own, "
            "or another MASTER_PORT if they belong to different runs"
        )
    return None


def _named(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """Return the first of some ranks in words, with their nodes where a launcher tells (else `nodes` is empty)."""
    words = [f"{rank} on {nodes[rank]}" if rank < len(nodes) else str(rank) for rank in ranks[:_NAMED_RANKS]]
    others = " and others" if len(ranks) > len(words) else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}{others}"


def _leave_together(world_size: int) -> None:
    """Wait until all ranks are done: rank 0's store, and connections that others still read, live until then."""
    store = dist.distributed_c10d._get_default_store()
    if store.add("megalm/left", 1) == world_size:
        store.set("megalm/all-left", "")
    store.wait(["megalm/all-left"], timedelta(seconds=_LEAVE_TIMEOUT_S))


def _one_line(error: BaseException) -> str:
    """Return the first sentence of torch's message, without source positions and stacks."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.rsplit("] ", 1)[-1].split(". ")[0].strip()[:200]
