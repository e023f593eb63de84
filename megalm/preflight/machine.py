"""What the operating system gives to a rank: limits, shared memory, CPUs, threads, swap, a compiler, a clock. No torch.

Each `check_` function reads the machine and hands what it read to pure functions, which judge.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import struct
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megalm.preflight.finding import Finding, Level, Place, gib
from megalm.preflight.versions import pci_accelerators

UNLIMITED = resource.RLIM_INFINITY
_FEW_FILES, _ENOUGH_FILES = 1024, 4096
_ENOUGH_PROCESSES = 4096
_SMALL_STACK = 8 * 2**20
_SHM_A_RANK = 64 * 2**20  # NCCL and the loader's workers take some 30 MiB a rank
_USED_SWAP = 2**30
_STA_UNSYNC = 0x40
_TIME_ERROR = 5


def limit_findings(soft: Mapping[str, int], has_rdma: bool) -> list[Finding]:
    """Judge soft limits: `nofile` and `nproc` count, `memlock` and `stack` are bytes; UNLIMITED is negative."""
    findings = []

    def short(name: str, wanted: int) -> bool:
        return soft[name] != UNLIMITED and soft[name] < wanted

    if short("nofile", _ENOUGH_FILES):
        level: Level = "fail" if short("nofile", _FEW_FILES) else "warn"
        text = f"{soft['nofile']} open files; each peer and each shard is one"
        findings.append(Finding("limits", level, text, "ulimit -n 65536  # limits.conf: * - nofile 65536"))
    if has_rdma and soft["memlock"] != UNLIMITED:
        text = f"only {gib(soft['memlock'])} may be locked; InfiniBand registers buffers of any size"
        findings.append(Finding("limits", "fail", text, "ulimit -l unlimited  # Slurm: PropagateResourceLimitsExcept"))
    if short("nproc", _ENOUGH_PROCESSES):
        text = f"{soft['nproc']} processes and threads of this user"
        findings.append(Finding("limits", "warn", text, "ulimit -u 65536  # limits.conf: * - nproc 65536"))
    if short("stack", _SMALL_STACK):
        findings.append(Finding("limits", "warn", f"a stack of {gib(soft['stack'])}", "ulimit -s 8192"))
    return findings or [Finding("limits", "ok", ", ".join(f"{name} {_shown(soft[name])}" for name in soft))]


def _shown(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def check_limits(place: Place) -> Iterator[Finding]:
    """Open files, locked memory, processes and the stack."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK}
    kinds |= {"nproc": resource.RLIMIT_NPROC, "stack": resource.RLIMIT_STACK}
    rdma = Path("/sys/class/infiniband")
    has_rdma = rdma.is_dir() and any(rdma.iterdir())
    yield from limit_findings({name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}, has_rdma)


def shm_finding(total: int, free: int, local_ranks: int) -> Finding:
    """Judge the bytes of /dev/shm, through which ranks of one machine talk."""
    text = f"{gib(free)} of {gib(total)} free in /dev/shm"
    remedy = "docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm; remove what dead jobs left there"
    if free < _SHM_A_RANK * local_ranks:
        return Finding("shm", "fail", f"{text}, too little for {local_ranks} ranks", remedy)
    if total < 2**30:
        return Finding("shm", "warn", text, remedy)
    return Finding("shm", "ok", text)


def check_shm(place: Place) -> Iterator[Finding]:
    """Shared memory."""
    usage = shutil.disk_usage("/dev/shm")
    yield shm_finding(usage.total, usage.free, place.local_ranks)


def cpu_list(text: str) -> set[int]:
    """Return the CPUs in a list such as `0-3,8`, as sysfs has them."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def cpu_findings(allowed: Collection[int], nodes: Mapping[int, Collection[int]], local_ranks: int) -> list[Finding]:
    """Judge the CPUs that this process may use against the ranks here and the NUMA nodes."""
    here = sorted(node for node, cpus in nodes.items() if set(cpus) & set(allowed))
    text = f"{len(allowed)} CPUs on NUMA node{'s' if len(here) > 1 else ''} {', '.join(map(str, here)) or '?'}"
    text += f" of {len(nodes)}" if len(nodes) > 1 else ""
    if len(allowed) < local_ranks:
        remedy = "srun --cpus-per-task=8 --cpu-bind=cores, or fewer processes"
        return [Finding("cpus", "warn", f"{text} for {local_ranks} ranks: they take turns", remedy)]
    if len(nodes) > 1 and len(here) == len(nodes) and local_ranks > 1:
        text += f"; {local_ranks} ranks may wander between them"
        return [Finding("cpus", "ok", text, "srun --cpu-bind=cores binds each rank")]
    return [Finding("cpus", "ok", text)]


def check_cpus(place: Place) -> Iterator[Finding]:
    """CPUs and NUMA nodes."""
    root = Path("/sys/devices/system/node")
    paths = sorted(root.glob("node[0-9]*")) if root.is_dir() else []
    nodes = {int(path.name[4:]): cpu_list((path / "cpulist").read_text()) for path in paths}
    yield from cpu_findings(os.sched_getaffinity(0), nodes, place.local_ranks)


def thread_finding(omp: str | None, cpus: int, local_ranks: int) -> Finding:
    """Judge OMP_NUM_THREADS: threads of all ranks share the CPUs."""
    each = max(1, cpus // local_ranks)
    remedy = f"export OMP_NUM_THREADS={each}"
    if omp is None:
        text = f"OMP_NUM_THREADS is not set: {local_ranks} ranks start {cpus} threads each"
        if local_ranks == 1:
            return Finding("threads", "ok", f"OMP_NUM_THREADS is not set: {cpus} threads")
        return Finding("threads", "warn", text, remedy)
    if not omp.split(",")[0].isdecimal() or int(omp.split(",")[0]) == 0:
        return Finding("threads", "warn", f"OMP_NUM_THREADS={omp} is no number of threads", remedy)
    threads = int(omp.split(",")[0])
    if threads * local_ranks > cpus and threads > 1:
        text = f"OMP_NUM_THREADS={threads} for each of {local_ranks} ranks on {cpus} CPUs"
        return Finding("threads", "warn", text, remedy)
    return Finding("threads", "ok", f"OMP_NUM_THREADS={threads}, {local_ranks} ranks, {cpus} CPUs")


def check_threads(place: Place) -> Iterator[Finding]:
    """Threads of all ranks against the CPUs."""
    yield thread_finding(place.environ.get("OMP_NUM_THREADS"), len(os.sched_getaffinity(0)), place.local_ranks)


def memory_findings(available: int, total: int, swap_used: int) -> list[Finding]:
    """Judge the machine's memory and its use of swap, in bytes."""
    text = f"{gib(available)} of {gib(total)} available, {gib(swap_used)} swapped out"
    if available < 0.05 * total:
        return [Finding("memory", "warn", text, "ps -eo pid,rss,args --sort=-rss | head")]
    if swap_used > _USED_SWAP:
        return [Finding("memory", "warn", text, "swapoff -a && swapon -a  # once there is memory; see who took it")]
    return [Finding("memory", "ok", text)]


def check_memory(place: Place) -> Iterator[Finding]:
    """Memory and swap."""
    import psutil

    memory = psutil.virtual_memory()
    yield from memory_findings(memory.available, memory.total, psutil.swap_memory().used)


def compiler_findings(compiler: str | None, has_headers: bool, has_gpus: bool) -> list[Finding]:
    """Judge what Triton builds its launchers with: a C compiler and Python's headers. nvcc is needed for nothing."""
    level: Level = "fail" if has_gpus else "warn"
    findings = []
    if compiler is None:
        text = "no C compiler (cc, gcc, clang): Triton cannot build its launchers"
        findings.append(Finding("compiler", level, text, "apt-get install gcc, or module load gcc"))
    if not has_headers:
        text = "Python.h is missing: Triton cannot build its launchers"
        findings.append(Finding("compiler", level, text, "apt-get install python3-dev"))
    return findings or [Finding("compiler", "ok", f"{compiler}, Python.h")]


def check_compiler(place: Place) -> Iterator[Finding]:
    """A C compiler and Python's headers."""
    names = [place.environ.get("CC", "").split(" ")[0], "cc", "gcc", "clang"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    yield from compiler_findings(compiler, headers.is_file(), bool(pci_accelerators()))


def clock_finding(state: int, status: int, max_error_us: int) -> Finding:
    """Judge what the kernel says of its clock's discipline (adjtimex: return value, status bits, microseconds)."""
    if state < 0:
        return Finding("clock", "ok", "the kernel does not tell whether the clock is set")
    if state == _TIME_ERROR or status & _STA_UNSYNC:
        text = "no time service keeps the clock (the kernel says so)"
        return Finding("clock", "warn", text, "systemctl enable --now chronyd; chronyc tracking")
    return Finding("clock", "ok", f"synchronized, error at most {max_error_us / 1000:.1f} ms")


def check_clock(place: Place) -> Iterator[Finding]:
    """Whether a time service keeps the clock, as the kernel knows it."""
    timex = ctypes.create_string_buffer(256)  # modes = 0: only read
    state = ctypes.CDLL(None).adjtimex(timex)
    # struct timex on 64-bit Linux: modes, offset, freq, maxerror, esterror, status
    _, _, _, max_error_us, _, status = struct.unpack_from("@Illlli", timex)
    yield clock_finding(state, status, max_error_us)
