"""`megalm launch mpi`: the argument list of mpirun, which replaces this process. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megalm.distributed.rendezvous import valid_host
from megalm.errors import LaunchError
from megalm.launch.slurm import require_program


def mpirun_arguments(recipe: str, overrides: Sequence[str], nproc: int, hosts: str | None) -> list[str]:
    """Return mpirun's argument list for `nproc` ranks; `hosts` is `a:8,b:8`, or None for where mpirun puts them.

    `-n` and `-host` are understood by Open MPI and MPICH alike. Raises LaunchError for hosts that are none.
    """
    place = []
    if hosts is not None:
        for entry in hosts.split(","):
            host, colon, slots = entry.partition(":")
            valid_host(host, "--hosts")
            if colon and not (slots.isdecimal() and slots.isascii() and int(slots) > 0):
                raise LaunchError(f"--hosts: {entry!r} has no number behind the colon; write host or host:ranks")
        place = ["-host", hosts]
    return ["mpirun", "-n", str(nproc), *place, sys.executable, "-m", "megalm", "train", recipe, *overrides]


def run(arguments: Sequence[str]) -> NoReturn:
    """Become mpirun, so that signals and the exit status are its own. Raises LaunchError where it is missing."""
    program = require_program("mpirun", "install an MPI and megalm[mpi], or use megalm train --nproc N")
    sys.stdout.flush()
    os.execv(program, list(arguments))
