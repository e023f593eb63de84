"""Environment variables that contradict each other or the machine, and its network interfaces. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from megalm.distributed.rendezvous import read_environment
from megalm.errors import LaunchError
from megalm.preflight.finding import Finding, Level, Place
from megalm.preflight.versions import pci_accelerators

# Set for a hunt for an error, and forgotten: each costs speed, or a hang where an error would be.
_LEFTOVERS = {
    ("CUDA_LAUNCH_BLOCKING", "1"): "every kernel is waited for",
    ("NCCL_P2P_DISABLE", "1"): "GPUs of a node talk through the host's memory",
    ("NCCL_IB_DISABLE", "1"): "nodes talk through TCP even where there is InfiniBand",
    ("NCCL_SHM_DISABLE", "1"): "ranks of a node talk through the network",
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"): "a dead peer hangs the job instead of ending it",
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): "every collective is checked by another one",
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1"): "a waiting receive holds up collectives",
    ("PYTHONOPTIMIZE", "1"): "assertions are off",
}


def variable_findings(environ: Mapping[str, str], interfaces: Collection[str], has_gpus: bool) -> list[Finding]:
    """Judge the environment of a rank, or of the shell that is to start ranks."""
    findings = [*_rendezvous(environ), *_interface_names(environ, interfaces)]

    def add(level: Level, text: str, remedy: str) -> None:
        findings.append(Finding("environment", level, text, remedy))

    if environ.get("CUDA_VISIBLE_DEVICES") == "":
        add(
            "fail" if has_gpus else "warn",
            "CUDA_VISIBLE_DEVICES is empty: no GPU is seen",
            "unset CUDA_VISIBLE_DEVICES",
        )
    shown = {name: environ[name] for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if environ.get(name)}
    if len(set(shown.values())) > 1:
        text = " contradicts ".join(f"{name}={value}" for name, value in shown.items())
        add("warn", text, f"unset {next(iter(shown))}")
    for (name, value), effect in _LEFTOVERS.items():
        if environ.get(name) == value:
            add("warn", f"{name}={value}: {effect}", f"unset {name}")
    if has_gpus and environ.get("TRITON_INTERPRET") == "1":
        add(
            "fail",
            "TRITON_INTERPRET=1: kernels run in an interpreter, a thousand times slower",
            "unset TRITON_INTERPRET",
        )
    return findings or [Finding("environment", "ok", "no contradictions")]


def _rendezvous(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        read_environment(environ, lambda rank, size: ("localhost", 1))
    except LaunchError as error:
        fault, _, remedy = str(error).partition("; ")
        yield Finding("environment", "fail", fault, remedy)


def _interface_names(environ: Mapping[str, str], interfaces: Collection[str]) -> Iterator[Finding]:
    """Judge the names that NCCL (prefixes, `=` exact, `^` all but) and gloo (exact names) are given."""
    known = ", ".join(sorted(interfaces))
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(name, "")
        if value and not _matches(value, interfaces, exact=name.startswith("GLOO")):
            text = f"{name}={value} names no interface of this machine ({known})"
            yield Finding("environment", "fail", text, f"unset {name}, or name one of these")


def _matches(value: str, interfaces: Collection[str], exact: bool) -> bool:
    without = value.startswith("^")
    names = value.lstrip("^")
    exact = exact or names.startswith("=")
    words = [word for word in names.lstrip("=").split(",") if word]
    hits = {name for name in interfaces for word in words if name == word or (not exact and name.startswith(word))}
    return len(hits) < len(interfaces) if without else bool(hits)


def interface_findings(addresses: Mapping[str, Collection[str]], up: Mapping[str, int]) -> list[Finding]:
    """Judge the interfaces: addresses by name, and the speed in Mb/s (0: unknown) of those that are up."""
    usable = {name: speed for name, speed in up.items() if name != "lo" and addresses.get(name)}
    if not usable:
        text = "no network interface but the loopback is up: this machine can train alone only"
        return [Finding("network", "warn", text, "ip link; ip addr")]
    shown = [f"{name}{f' {speed / 1000:g} Gb/s' if speed > 0 else ''}" for name, speed in sorted(usable.items())]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return [Finding("network", "ok", ", ".join(shown[:6]) + more)]


def check_network(place: Place) -> Iterator[Finding]:
    """Network interfaces with an IP address."""
    import psutil

    found = psutil.net_if_addrs()
    inet = {name: [a.address for a in rows if a.family.name in ("AF_INET", "AF_INET6")] for name, rows in found.items()}
    up = {name: state.speed for name, state in psutil.net_if_stats().items() if state.isup}
    yield from interface_findings(inet, up)


def check_environment(place: Place) -> Iterator[Finding]:
    """Contradictory or costly environment variables."""
    import psutil

    yield from variable_findings(place.environ, list(psutil.net_if_addrs()), bool(pci_accelerators()))
