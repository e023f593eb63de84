"""How long a GPU works on a call, without what the host needs to issue it; the rates that floors are made of.

A sample is one pass over several sets of inputs which together exceed the L2 cache, so that no call finds its input
there. Before it the GPU is kept asleep until the host has issued all calls: what is measured is the GPU's work alone,
as in a training step whose host runs ahead. A sample during which the GPU woke up too early counts as `late`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_CYCLES_A_SECOND = 2.0e9  # of the fastest clock: the sleep is never too short for it
_MARGIN = 1.5


@dataclass
class Samples:
    """The times of one contestant."""

    device_s: list[float] = field(default_factory=list)
    """Of one call."""
    host_s: list[float] = field(default_factory=list)
    """What the host took to issue one call."""
    late: int = 0

    def figures(self) -> dict[str, float]:
        """Return median and quartiles of the device's time, the host's median, and how many samples were late."""
        low, median, high = quartiles(self.device_s)
        return {
            "median_us": 1e6 * median,
            "low_us": 1e6 * low,
            "high_us": 1e6 * high,
            "host_us": 1e6 * statistics.median(self.host_s),
            "samples": len(self.device_s),
            "late": self.late,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def take_sample(calls: Sequence[Callable[[], object]], samples: Samples, device: torch.device) -> None:
    """Add the time of one pass over the calls, one a set of inputs, divided by their number."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for call in calls:
            call()
        samples.device_s.append((time.perf_counter() - begin) / len(calls))
        samples.host_s.append(samples.device_s[-1])
        return
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ahead_s = _MARGIN * len(calls) * max(samples.host_s[-3:], default=2e-3) + 2e-4
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(ahead_s * _CYCLES_A_SECOND))
    start.record()
    begin = time.perf_counter()
    for call in calls:
        call()
    samples.host_s.append((time.perf_counter() - begin) / len(calls))
    samples.late += start.query()  # the GPU was through with the sleep before the host was with the calls
    end.record()
    torch.cuda.synchronize(device)
    samples.device_s.append(1e-3 * start.elapsed_time(end) / len(calls))


def sets_needed(bytes_of_a_set: int, device: torch.device) -> int:
    """Return how many sets of inputs exceed twice the L2 cache, 2 to 16; one for sets of 64 times its size."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if bytes_of_a_set >= 64 * cache else min(16, max(2, -(-2 * cache // bytes_of_a_set)))


def measured_rates(device: torch.device, rounds: int) -> dict[str, float]:
    """Return what the floors are made of: bytes a second of a copy (read and written), FLOP/s of a bf16 product."""
    large = device.type == "cuda"
    count, size = (2**29, 8192) if large else (2**20, 128)
    source, target = (torch.empty(count, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)

    def copy() -> Tensor:
        return target.copy_(source)

    def multiply() -> Tensor:
        return torch.mm(a, b, out=product)

    medians = []
    for call in (copy, multiply):
        samples = Samples()
        for _ in range(rounds + 3):
            take_sample([call], samples, device)
        medians.append(statistics.median(samples.device_s[3:]))
    return {"copy_bytes_s": 2 * 2 * count / medians[0], "product_flop_s": 2 * size**3 / medians[1]}
