"""A case's contestants: who is right, and how long each takes, in turns.

Owns the check against fp32 and the order of the samples; how a sample is timed is `device_timing`'s.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from device_timing import Samples, sets_needed, take_sample
from kernel_cases import Call, Case, Inputs, total_bytes
from peers import Peer, Unavailable, contestants
from torch import Tensor

TOLERANCE = 0.05
"""Relative L2 error against fp32 from which a contestant is wrong. bf16 keeps 8 bits: an exact result rounded once has
0.2%, and a gradient through several roundings a few times that; an error of method is some tens of percent."""
SEED = 1


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """Return one tensor or several as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def upstream_of(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return the gradients that are handed back: 1 for a loss, random numbers otherwise."""
    gradients = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(1000 * seed + number)
        drawn = torch.randn(output.shape, generator=generator, device=output.device)
        gradients.append(torch.ones_like(output) if output.dim() == 0 else drawn.to(output.dtype))
    return gradients


def results_of(case: Case, call: Call, inputs: Inputs, upstream: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Return outputs, the upstream gradients and the gradients, by name."""
    outputs = as_tuple(call(inputs))
    results = {f"out{number}": output.detach() for number, output in enumerate(outputs)}
    leaves = case.leaves(inputs)
    if leaves:
        upstream = upstream_of(outputs, SEED) if upstream is None else upstream
        results |= {f"grad_out{number}": gradient for number, gradient in enumerate(upstream)}
        gradients = torch.autograd.grad(outputs, [inputs[name] for name in leaves], upstream)
        results |= {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


class Judge:
    """Compares contestants of one case with the plain formula in fp32, of which it keeps the results."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.sizes = case.operation.checked(case.sizes)
        self.device = device
        self._expected: dict[str, Tensor] | None = None

    def errors(self, call: Call) -> dict[str, float]:
        """Return the relative L2 error of each output and gradient."""
        results = results_of(self.case, call, self.case.inputs(self.device, SEED, self.sizes))
        results = self._part(results)
        if self._expected is None:
            self._expected = self._in_fp32(results)
        return {
            name: (results[name].float() - expected).norm().div(expected.norm()).item()
            for name, expected in self._expected.items()
        }

    def _part(self, values: dict[str, Any]) -> dict[str, Any]:
        """Pick what is compared; upstream gradients (grad_out0, ...) are cut as the outputs are."""
        part = partial(self.case.operation.part, self.sizes)
        upstream = part({name[5:]: x for name, x in values.items() if name.startswith("grad_")})
        values = part({name: x for name, x in values.items() if not name.startswith("grad_")})
        return values | {f"grad_{name}": x for name, x in upstream.items()}

    def _in_fp32(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        wide = {name: widened(x) for name, x in self._part(self.case.inputs(self.device, SEED, self.sizes)).items()}
        for name in self.case.leaves(wide):
            wide[name].requires_grad_()
        upstream = [results[name].float() for name in sorted(results) if name.startswith("grad_")]
        expected = results_of(self.case, self.case.operation.plain(self.sizes), wide, upstream)
        return {name: value for name, value in expected.items() if not name.startswith("grad_")}


def widened(value: Any) -> Any:
    """Return copies in fp32 of the floating-point tensors of a value."""
    if isinstance(value, list):
        return [widened(x) for x in value]
    return value.detach().clone().float() if value.is_floating_point() else value


@dataclass
class Contestant:
    """One that has passed the check, with its times by pass."""

    call: Call
    passes: list[str]
    errors: dict[str, float]
    times: dict[str, Samples] = field(default_factory=dict)
    extra_bytes: int | None = None


class Race:
    """Times the contestants of one case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        first = case.inputs(device, SEED)
        count = sets_needed(total_bytes(first), device)
        self.sets = [first, *(case.inputs(device, SEED + number) for number in range(1, count))]
        self._upstream: dict[Any, list[Tensor]] = {}

    def calls(self, call: Call, name: str) -> list[Callable[[], object]]:
        """Return what is timed of a pass, a call a set of inputs; for a backward pass the forward pass is done here."""
        if name == "forward":
            return [partial(call, x) for x in self.sets]
        if name == "both":
            return [partial(self._both, call, number) for number in range(len(self.sets))]
        outputs = [as_tuple(call(x)) for x in self.sets]
        return [partial(self._backward, out, number) for number, out in enumerate(outputs)]

    def _backward(self, outputs: tuple[Tensor, ...], number: int) -> None:
        x = self.sets[number]
        torch.autograd.grad(outputs, [x[name] for name in self.case.leaves(x)], self._gradients(outputs, number))

    def _both(self, call: Call, number: int) -> None:
        self._backward(as_tuple(call(self.sets[number])), number)

    def _gradients(self, outputs: tuple[Tensor, ...], number: int) -> list[Tensor]:
        key = number, tuple((tuple(out.shape), out.dtype) for out in outputs)
        if key not in self._upstream:
            self._upstream[key] = upstream_of(outputs, number)
        return self._upstream[key]

    def sample(self, contestant: Contestant, name: str, samples: Samples) -> None:
        """Take one sample of a pass."""
        take_sample(self.calls(contestant.call, name), samples, self.device)

    def extra_bytes(self, call: Call) -> int | None:
        """Return what both passes need at most beside inputs and gradients; None where it is not known."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._both(call, 0)
        gradients = sum(self.sets[0][name].nbytes for name in self.case.leaves(self.sets[0]))
        return torch.cuda.max_memory_allocated() - before - gradients


def run_case(case: Case, device: torch.device, rates: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """Check and time all contestants of a case; return the figures."""
    cost = case.operation.cost(case.sizes)
    judge = Judge(case, device)
    running, missing = {}, {}
    if device.type == "cuda":
        torch.compiler.reset()
    for name, peer in contestants(case, device).items():
        try:
            running[name] = admitted(case, peer, judge, list(cost))
        except Exception as error:  # a peer's failure is a result
            missing[name] = reason(error)
    del judge
    release(device)
    race = Race(case, device)
    for name, contestant in list(running.items()):
        try:
            for pass_name in contestant.passes:
                for _ in range(2):
                    race.sample(contestant, pass_name, Samples())
            if case.op == "linear_cross_entropy":
                contestant.extra_bytes = race.extra_bytes(contestant.call)
        except Exception as error:
            missing[name] = reason(error)
            del running[name]
        release(device)
    generator = random.Random(SEED)
    for _ in range(rounds):
        for pass_name in cost:
            names = [name for name in running if pass_name in running[name].passes]
            generator.shuffle(names)
            for name in names:
                race.sample(running[name], pass_name, running[name].times.setdefault(pass_name, Samples()))
    passes = {name: pass_figures(name, work, running, rates) for name, work in cost.items()}
    return {"op": case.op, "sizes": dict(case.sizes), "sets": len(race.sets), "passes": passes, "missing": missing}


def admitted(case: Case, peer: Peer, judge: Judge, passes: list[str]) -> Contestant:
    """Return a contestant whose results are right."""
    call = peer.build(case)
    errors = judge.errors(lambda inputs: peer.joined(call(inputs)))
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise Unavailable("wrong: " + ", ".join(f"{name} is off by {error:.1%}" for name, error in wrong.items()))
    return Contestant(call, [name for name in passes if name in peer.passes], errors)


def reason(error: Exception) -> str:
    """Return why a contestant does not run, in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


def release(device: torch.device) -> None:
    """Give memory back that the next contestant may need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pass_figures(
    name: str, work: tuple[float, float], running: Mapping[str, Contestant], rates: Mapping[str, float]
) -> dict[str, Any]:
    """Return the figures of one pass."""
    flops, moved = work
    by_flops, by_bytes = flops / rates["product_flop_s"], moved / rates["copy_bytes_s"]
    floor_s = max(by_flops, by_bytes)
    found = {}
    for contestant, state in running.items():
        if name not in state.times:
            continue
        figures: dict[str, Any] = state.times[name].figures()
        seconds = 1e-6 * figures["median_us"]
        figures |= {"tflop_s": 1e-12 * flops / seconds, "of_floor": floor_s / seconds, "errors": state.errors}
        if state.extra_bytes is not None:
            figures["extra_bytes"] = state.extra_bytes
        found[contestant] = figures
    bound = "flops" if by_flops > by_bytes else "bytes"
    return {"flops": flops, "bytes": moved, "floor_us": 1e6 * floor_s, "bound": bound, "contestants": found}
