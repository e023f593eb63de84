"""mpi4py as a second opinion on the network and on who is there, where an MPI launcher started the ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from megalm.preflight.finding import Finding

_BYTES = 2**22
_ROUNDS = 4


@dataclass(frozen=True)
class Witness:
    """What MPI says: its rank and size, whether a sum came out right, the bus bandwidth in bytes/s. Or why not."""

    rank: int = 0
    size: int = 0
    right: bool = False
    bytes_per_s: float = 0.0
    skipped: str = ""


def reason_to_skip(environ: Mapping[str, str]) -> str:
    """Return why MPI has nothing to say; empty where mpirun, or srun with PMIx, started this process."""
    if any(name in environ for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK")):
        return ""
    if "PMI_SIZE" in environ and "SLURM_STEP_ID" not in environ:
        return ""
    return "not started by mpirun or srun --mpi=pmix"


def ask(environ: Mapping[str, str]) -> Witness:
    """Let MPI sum over all ranks, and time it. Every rank must call, before `finish`; MPI stays up in between."""
    skipped = reason_to_skip(environ)
    if skipped:
        return Witness(skipped=skipped)
    try:
        import numpy
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return Witness(skipped=f"mpi4py does not load ({' '.join(str(error).split())[:120]})")
    world = MPI.COMM_WORLD
    count = world.Get_size()
    x, total = numpy.ones(_BYTES // 4, numpy.float32), numpy.empty(_BYTES // 4, numpy.float32)
    best_s = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        world.Allreduce(x, total)
        best_s = min(best_s, time.perf_counter() - begin)
    bandwidth = 2 * (count - 1) / count * _BYTES / best_s
    return Witness(world.Get_rank(), count, bool((total == count).all()), bandwidth)


def finish() -> None:
    """End MPI where it still runs: at the process's end it would wait for ranks that may be gone."""
    import sys

    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()


def witness_findings(said: list[Witness]) -> list[Finding]:
    """Judge what MPI said on each rank, in the order of the world's ranks."""
    skipped = [witness for witness in said if witness.skipped]
    if skipped:
        text = f"mpi4py as a witness: skipped, {skipped[0].skipped}"
        return [Finding("mpi", "ok" if len(skipped) == len(said) else "warn", text, "start all ranks alike")]
    strange = [rank for rank, witness in enumerate(said) if (witness.rank, witness.size) != (rank, len(said))]
    if strange:
        witness = said[strange[0]]
        text = f"mpi4py takes rank {strange[0]} of {len(said)} for rank {witness.rank} of {witness.size}"
        return [Finding("mpi", "fail", text, "srun --mpi=pmix, or mpirun of the MPI that mpi4py loads")]
    wrong = [rank for rank, witness in enumerate(said) if not witness.right]
    if wrong:
        text = f"MPI's sum over all ranks is wrong on rank {wrong[0]}"
        return [Finding("mpi", "fail", text, "another MPI or another fabric: see the library's own tests")]
    slowest = min(witness.bytes_per_s for witness in said)
    text = f"mpi4py agrees: {len(said)} ranks, the sum is right, {slowest / 1e9:.3g} GB/s bus bandwidth at 4 MiB"
    return [Finding("mpi", "ok", text)]
