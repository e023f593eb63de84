"""Which rank this process is and where the ranks meet, read from the variables that a launcher left. No torch.

Known launchers: torchrun and plain variables, srun, and mpirun of Open MPI and MPICH. What is partial or contradicts
itself is a LaunchError: a process that took itself for a world of one would train alone and overwrite its peers' run.
`launch.py` starts the process group from what is found here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from megalm.errors import LaunchError

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_MPI_VARIABLES = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
# Slurm numbers its own steps (interactive, batch, extern, pending) from here on; no srun started those.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below Linux's ephemeral ports (32768 on), so that no outgoing connection holds the port by chance.
_FIRST_PORT, _PORTS, _STEPS_A_JOB = 15_000, 16_000, 16

MeetingPoint = Callable[[int, int], tuple[str, int]]
"""Called on every rank with (rank, world size); returns the address and port that rank 0 offers to all."""


@dataclass(frozen=True)
class Rendezvous:
    """One rank's place and the meeting point. `local_size` is None where the launcher does not tell it."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int | None
    address: str
    port: int
    launcher: str
    # torchrun's agent holds the store at address:port itself and counts its restarts; nobody else does.
    agent_store: bool = False
    attempt: str = "0"


def read_environment(environ: Mapping[str, str], meeting_point: MeetingPoint | None = None) -> Rendezvous | None:
    """Return what the launcher says, or None if none has started this process.

    `meeting_point` replaces the exchange through mpi4py. Under srun and MPI, MASTER_ADDR and MASTER_PORT are taken if
    set. Raises LaunchError, which names the variables and the remedy, for a partial or contradictory environment.
    """
    known = {name: value for name, value in environ.items() if value != ""}
    if any(name in known for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_variables(known)
    kind = next((kind for kind in _MPI_VARIABLES if _under_mpi(kind, known)), None)
    if kind is not None:
        return _from_mpi(kind, known, meeting_point or _meet_through_mpi4py)
    if _in_slurm_step(known):
        return _from_slurm(known)
    if "PMIX_RANK" in known:
        raise LaunchError(
            f"PMIX_RANK={known['PMIX_RANK']} is set, but neither OMPI_COMM_WORLD_* nor SLURM_STEP_ID; "
            "start with Open MPI's mpirun, with srun or with torchrun"
        )
    stray = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in known]
    if stray:
        raise LaunchError(_partial(stray, [name for name in _REQUIRED if name not in known]))
    return None


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list such as `node[01-03,7],x`; LaunchError if it is malformed."""
    return next(expand_node_list(node_list))


def expand_node_list(node_list: str) -> Iterator[str]:
    """Yield the hosts of a Slurm node list one by one, in its order; LaunchError if it is malformed."""
    entries = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list)
    if ",".join(entries) != node_list or not entries:
        raise LaunchError(f"the node list {node_list!r} is malformed; expected hosts such as node[01-03,7],x")
    for entry in entries:
        pieces = re.split(r"\[([^\[\]]*)\]", entry)  # text, bracket, text, bracket, ..., text
        choices = [list(_bracket(piece, node_list)) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
        for parts in product(*choices):
            yield valid_host("".join(parts), "the node list")


def _bracket(text: str, node_list: str) -> Iterator[str]:
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first) or int(last) - int(first) >= 1_000_000:
            raise LaunchError(f"the node list {node_list!r} is malformed at {part!r}; expected a range such as 01-03")
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


def _from_variables(known: Mapping[str, str]) -> Rendezvous:
    """Read torchrun's variables, or the same ones set by hand."""
    missing = [name for name in _REQUIRED if name not in known]
    if missing:
        raise LaunchError(_partial([name for name in _REQUIRED if name in known], missing))
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in known else "environment"
    found = Rendezvous(
        rank=_integer(known, "RANK"),
        world_size=_integer(known, "WORLD_SIZE"),
        local_rank=_integer(known, "LOCAL_RANK"),
        local_size=_integer(known, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in known else None,
        address=valid_host(known["MASTER_ADDR"], "MASTER_ADDR"),
        port=_port(known),
        launcher=launcher,
        agent_store=known.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=known.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
    _check(found, "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE")
    if launcher == "environment":
        # torchrun under srun has a world of its own; variables set by hand must be those of the tasks around them.
        pairs = [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")]
        pairs += [("SLURM_NTASKS", "SLURM_PROCID")] if _in_slurm_step(known) else []
        for size_name, rank_name in pairs:
            size, rank = (int(known.get(name, default)) for name, default in ((size_name, "1"), (rank_name, "0")))
            if size > 1 and (size, rank) != (found.world_size, found.rank):
                raise LaunchError(
                    f"RANK={found.rank} of WORLD_SIZE={found.world_size} contradicts {rank_name}={rank} of "
                    f"{size_name}={size}; unset RANK, WORLD_SIZE and LOCAL_RANK"
                )
    return found


def _from_slurm(known: Mapping[str, str]) -> Rendezvous:
    """Read a task of an srun step."""
    needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in known]
    node_list = known.get("SLURM_STEP_NODELIST") or known.get("SLURM_JOB_NODELIST") or known.get("SLURM_NODELIST")
    if "MASTER_ADDR" not in known and node_list is None:
        missing.append("SLURM_STEP_NODELIST")
    if missing:
        raise LaunchError(
            f"SLURM_STEP_ID={known['SLURM_STEP_ID']} is set, but not {', '.join(missing)}; start with srun, "
            "or unset SLURM_STEP_ID to run outside of the step"
        )
    world_size = _integer(known, "SLURM_NTASKS")
    if _integer(known, "SLURM_STEP_NUM_TASKS", world_size) != world_size:
        raise LaunchError(
            f"SLURM_NTASKS={world_size} contradicts SLURM_STEP_NUM_TASKS={known['SLURM_STEP_NUM_TASKS']}; "
            "unset SLURM_NTASKS before srun"
        )
    found = Rendezvous(
        rank=_integer(known, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(known, "SLURM_LOCALID"),
        local_size=_tasks_on_node(known),
        address=valid_host(known.get("MASTER_ADDR") or first_host(node_list or ""), "MASTER_ADDR"),
        port=_port(known, slurm_port(_integer(known, "SLURM_JOB_ID"), _integer(known, "SLURM_STEP_ID"))),
        launcher="srun",
        attempt=known.get("SLURM_RESTART_COUNT", "0"),
    )
    _check(found, "SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE")
    return found


def slurm_port(job_id: int, step_id: int) -> int:
    """Return a port that all tasks of a step derive alike, and that neighbouring jobs and steps do not share."""
    return _FIRST_PORT + (job_id * _STEPS_A_JOB + step_id % _STEPS_A_JOB) % _PORTS


def _in_slurm_step(known: Mapping[str, str]) -> bool:
    """Tell a task of srun from the shell of sbatch or salloc, which has SLURM_NTASKS too and even SLURM_PROCID=0."""
    step = known.get("SLURM_STEP_ID")
    return step is not None and (not step.isdecimal() or int(step) < _FIRST_SPECIAL_STEP)


def _tasks_on_node(known: Mapping[str, str]) -> int | None:
    """Return this node's entry of a list such as `2(x3),1`; None if Slurm does not tell."""
    text = known.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None or "SLURM_NODEID" not in known:
        return None
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    node = _integer(known, "SLURM_NODEID")
    for count, times in counts:
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    raise LaunchError(
        f"SLURM_NODEID={known['SLURM_NODEID']} lies outside of SLURM_STEP_TASKS_PER_NODE={text}; start with srun"
    )


def _under_mpi(kind: str, known: Mapping[str, str]) -> bool:
    """Tell whether `kind`'s mpirun started this process. Where srun set MPICH's variables, Slurm's own are used."""
    rank, size, *_ = _MPI_VARIABLES[kind]
    return (rank in known or size in known) and not (kind == "MPICH" and _in_slurm_step(known))


def _from_mpi(kind: str, known: Mapping[str, str], meeting_point: MeetingPoint) -> Rendezvous:
    names = _MPI_VARIABLES[kind]
    missing = [name for name in names[:3] if name not in known]
    if missing:
        raise LaunchError(_partial([name for name in names if name in known], missing, "start with mpirun"))
    rank, world_size, local_rank = (_integer(known, name) for name in names[:3])
    if world_size == 1 and _in_slurm_step(known) and _integer(known, "SLURM_NTASKS", 1) > 1:
        raise LaunchError(
            f"{names[1]}=1 contradicts SLURM_NTASKS={known['SLURM_NTASKS']}: every task takes itself for a world of "
            "one; start with srun alone, with srun --mpi=pmix, or with mpirun alone"
        )
    given = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in known]
    if len(given) == 1:
        raise LaunchError(f"{given[0]} is set alone; set MASTER_ADDR and MASTER_PORT, or neither")
    address, port = (known["MASTER_ADDR"], _port(known)) if given else meeting_point(rank, world_size)
    local_size = _integer(known, names[3]) if names[3] in known else None
    address = valid_host(address, "the address of rank 0")
    found = Rendezvous(rank, world_size, local_rank, local_size, address, port, "mpirun")
    _check(found, ", ".join(names))
    return found


@cache
def _meet_through_mpi4py(rank: int, world_size: int) -> tuple[str, int]:
    """Broadcast rank 0's address and a free port of it, then end MPI: it is needed for nothing else.

    Once in a process, for MPI cannot begin again: the command line reads the environment before the ranks meet.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"started by mpirun, but mpi4py does not load ({' '.join(str(error).split())}); "
            "install megalm[mpi], or export MASTER_ADDR and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, world_size):
        raise LaunchError(
            f"mpirun says rank {rank} of {world_size}, mpi4py rank {world.Get_rank()} of {world.Get_size()}: it "
            "belongs to another MPI; build mpi4py with this mpirun's, or export MASTER_ADDR and MASTER_PORT"
        )
    one_host = world.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == world_size
    address, port = world.bcast(_offer(one_host) if rank == 0 else None, root=0)
    MPI.Finalize()
    return address, port


def _offer(one_host: bool) -> tuple[str, int]:
    """Return this host's address as its peers see it, and a port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return "127.0.0.1" if one_host else socket.gethostname(), port


def _check(found: Rendezvous, names: str) -> None:
    sizes = found.local_size if found.local_size is not None else found.world_size
    fine = 0 <= found.rank < found.world_size and 0 <= found.local_rank < sizes <= found.world_size
    if not fine or found.local_rank > found.rank:
        raise LaunchError(
            f"rank {found.rank} of {found.world_size}, local rank {found.local_rank} of {found.local_size} cannot be "
            f"({names}); ranks run from 0 to the size less 1"
        )


def _partial(present: Sequence[str], missing: Sequence[str], remedy: str = "") -> str:
    remedy = remedy or f"set all of {', '.join(_REQUIRED)}, or unset them to start on this machine alone"
    return f"{', '.join(present)} set, but {', '.join(missing)} missing; {remedy}"


def _integer(known: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = known.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,12}", text):
        raise LaunchError(f"{name}={text} is not a number; set it to a whole number of 0 or more")
    return int(text)


def _port(known: Mapping[str, str], default: int | None = None) -> int:
    port = _integer(known, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={port} is no port; use 1024 to 65535")
    return port


def valid_host(host: str, source: str) -> str:
    """Return the host name or address as it is. Raises LaunchError, naming `source`, for anything else."""
    if _HOST.fullmatch(host):
        return host
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        raise LaunchError(f"{source}={host!r} is neither a host name nor an address; name rank 0's host") from None
