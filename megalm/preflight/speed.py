"""How fast, and whether right, a device multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from megalm.preflight.finding import Finding, Place
from megalm.preflight.judge import slower_than_peers

_CPU_SIZE, _GPU_SIZE, _EXACT_SIZE = 512, 8192, 1024
_MEASURE_S = 0.5
_LEAST_ROUNDS = 4


def product_gflops(device: str) -> float:
    """Return the rate of square matrix products over half a second, in GFLOP/s: fp32 on a CPU, bf16 on a GPU.

    The mean and not the best: other processes on the device and CPU quotas are what is looked for.
    """
    import torch

    on_cpu = device == "cpu"
    size = _CPU_SIZE if on_cpu else _GPU_SIZE
    dtype = torch.float32 if on_cpu else torch.bfloat16
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = a @ b
    _wait(device)
    rounds, begin = 0, time.perf_counter()
    while rounds < _LEAST_ROUNDS or time.perf_counter() - begin < _MEASURE_S:
        torch.matmul(a, b, out=out)
        _wait(device)
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - begin) / 1e9


def product_is_exact(device: str) -> bool:
    """Tell whether a product of small whole numbers, exact in any precision, comes out right.

    The row sums of A B are A times the row sums of B: an independent way to the same numbers (Freivalds 1977).
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-2, 3, (_EXACT_SIZE, _EXACT_SIZE), generator=generator).float() for _ in range(2))
    expected = a.double() @ b.double().sum(1)
    product = a.to(device) @ b.to(device)
    return torch.equal(product.cpu().double().sum(1), expected)


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def product_findings(rates: Mapping[str, float], wrong: list[str]) -> list[Finding]:
    """Judge the rates in GFLOP/s of this machine's devices against each other; `wrong` ones give wrong results."""
    slow = set(slower_than_peers(rates))
    findings = []
    for device, rate in rates.items():
        text = f"{device}: {rate / 1000:.3g} TFLOP/s" if rate >= 1000 else f"{device}: {rate:.3g} GFLOP/s"
        values = {"gflops": rate}
        if device in wrong:
            text = f"{device} multiplies whole numbers WRONG"
            findings.append(Finding("product", "fail", text, "take the node out of service", values))
        elif device in slow:
            text += ", much slower than the others of this machine"
            remedy = "nvidia-smi -q -d PERFORMANCE,CLOCK,POWER; other processes on it"
            findings.append(Finding("product", "fail", text, remedy, values))
        else:
            findings.append(Finding("product", "ok", text, values=values))
    return findings


def check_product(place: Place) -> Iterator[Finding]:
    """The speed and the result of a matrix product on each GPU, or on the CPU."""
    import torch

    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count()) if place.device is None else [place.device]
        devices = [f"cuda:{index}" for index in indices]
    else:
        devices = ["cpu"]
    rates = {device: product_gflops(device) for device in devices}
    yield from product_findings(rates, [device for device in devices if not product_is_exact(device)])
