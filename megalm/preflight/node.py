"""All checks of one machine, in the order in which they are shown. No torch until a check needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megalm.preflight.environment import check_environment, check_network
from megalm.preflight.finding import Check, Finding, Place, run_check
from megalm.preflight.gpus import check_gpus
from megalm.preflight.machine import (
    check_clock,
    check_compiler,
    check_cpus,
    check_limits,
    check_memory,
    check_shm,
    check_threads,
)
from megalm.preflight.speed import check_product
from megalm.preflight.storage import check_disk
from megalm.preflight.versions import check_apex, check_mpi, check_python, check_torch

CHECKS = (
    Check("packages", check_python),
    Check("torch", check_torch, limit_s=60.0),  # the first import from a cold network file system takes long
    Check("mpi", check_mpi),
    Check("apex", check_apex),
    Check("gpus", check_gpus, every_rank=True),
    Check("product", check_product, every_rank=True, limit_s=60.0),
    Check("compiler", check_compiler),
    Check("limits", check_limits),
    Check("shm", check_shm),
    Check("cpus", check_cpus),
    Check("threads", check_threads, every_rank=True),
    Check("memory", check_memory),
    Check("disk", check_disk),
    Check("clock", check_clock),
    Check("environment", check_environment, every_rank=True),
    Check("network", check_network),
)


def node_name() -> str:
    """Return what the batch system calls this machine, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def examine(place: Place, every_rank_only: bool = False, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return all findings; with `every_rank_only` those that a rank makes that is not the first on its node."""
    return [
        finding for check in checks if check.every_rank or not every_rank_only for finding in run_check(check, place)
    ]
