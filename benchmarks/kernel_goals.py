"""What our kernels are to reach, as a table, and which of it a run of the benchmark has reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kernel_cases import Case, cases, visible
from peers import OURS

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A value of a run, at least or at most `wanted`. `value` raises KeyError where a figure is absent."""

    text: str
    value: Callable[[Results], float]
    wanted: float
    at_least: bool = True

    def judged(self, results: Results) -> dict[str, Any]:
        """Return text, value, whether it is met (None: not judged) and the line that says so."""
        sign = ">=" if self.at_least else "<="
        if not results["measurement"]:
            return self._verdict(None, None, f"not judged   {self.text}: wanted {sign} {self.wanted:g}")
        try:
            value = self.value(results)
        except KeyError as error:
            line = f"not judged   {self.text}: wanted {sign} {self.wanted:g}; this run has no {error.args[0]}"
            return self._verdict(None, None, line)
        met = value >= self.wanted if self.at_least else value <= self.wanted
        line = f"{'met' if met else 'NOT MET':<12} {self.text}: {value:.3g}, wanted {sign} {self.wanted:g}"
        return self._verdict(value, met, line)

    def _verdict(self, value: float | None, met: bool | None, line: str) -> dict[str, Any]:
        return {"goal": self.text, "wanted": self.wanted, "value": value, "met": met, "line": line}


def figure(results: Results, case: str, passed: str, who: str, key: str) -> float:
    """Return one figure of a run."""
    try:
        return results["cases"][case]["passes"][passed]["contestants"][who][key]
    except KeyError:
        raise KeyError(f"{key} of {who} in {case}, {passed}") from None


def _figure(case: str, passed: str, key: str) -> Callable[[Results], float]:
    return lambda results: figure(results, case, passed, OURS, key)


def _floors(case: str, passed: str) -> Callable[[Results], float]:
    return lambda results: 1 / figure(results, case, passed, OURS, "of_floor")


def _speed(case: str, passed: str, peer: str) -> Callable[[Results], float]:
    """How many times as fast as a peer we are."""
    return _relative(case, case, passed, peer)


def _relative(case: str, other: str, passed: str, who: str = OURS) -> Callable[[Results], float]:
    """How many times as long as our `case` someone's `other` case takes."""

    def value(results: Results) -> float:
        ours = figure(results, case, passed, OURS, "median_us")
        return figure(results, other, passed, who, "median_us") / ours

    return value


def _memory(case: str) -> Callable[[Results], float]:
    def value(results: Results) -> float:
        sizes = results["cases"][case]["sizes"] if case in results["cases"] else {"N": 1, "V": 1}
        return figure(results, case, "both", OURS, "extra_bytes") / (2 * sizes["N"] * sizes["V"])

    return value


def _window(passed: str) -> Callable[[Results], float]:
    by_name: dict[str, Case] = {case.name: case for case in cases(small=False)}
    window, full = (by_name[name] for name in ("attention window 1024 T=16384", "attention D128 T=16384"))
    ideal = visible(window.sizes) / visible(full.sizes)
    return lambda results: 1 / _relative(window.name, full.name, passed)(results) / ideal


def _attention_goals() -> list[Goal]:
    main, gqa, packed = "attention D128 T=8192", "attention GQA 8 T=8192", "attention packed 8 x 2048"
    goals = [
        Goal(f"{main} forward, speed against cuDNN", _speed(main, "forward", "cuDNN"), 0.95),
        Goal(f"{main} forward, TFLOP/s", _figure(main, "forward", "tflop_s"), 600),
        Goal(f"{main} backward, speed against cuDNN", _speed(main, "backward", "cuDNN"), 1.0),
        Goal(f"{main} backward, TFLOP/s", _figure(main, "backward", "tflop_s"), 500),
    ]
    for case in cases(small=False):
        if case.op == "attention":
            text = f"{case.name} forward, speed against FlexAttention"
            goals.append(Goal(text, _speed(case.name, "forward", "FlexAttention"), 1.15))
    for tokens in (2048, 8192):
        name = f"attention D64 T={tokens}"
        goals.append(Goal(f"{name} forward, speed against cuDNN", _speed(name, "forward", "cuDNN"), 1.1))
    for passed in ("forward", "backward"):
        goals += [
            Goal(f"{gqa} {passed}, speed against as many heads of keys", _relative(gqa, main, passed), 1.0),
            Goal(f"attention window 1024 T=16384 {passed}, times the ideal", _window(passed), 1.3, at_least=False),
            Goal(
                f"{packed} {passed}, speed against dense rows", _relative(packed, "attention D128 T=2048", passed), 0.95
            ),
        ]
    return goals


def _shares(case: str, forward: float, backward: float | None) -> list[Goal]:
    """Goals for shares of the copy's bandwidth."""
    wanted = {"forward": forward, "backward": backward}
    return [
        Goal(f"{case} {passed}, share of the copy's bandwidth", _figure(case, passed, "of_floor"), share)
        for passed, share in wanted.items()
        if share is not None
    ]


def goals() -> list[Goal]:
    """Return all goals."""
    norms = [f"{norm}{rest}" for norm in ("LayerNorm", "RMSNorm") for rest in ("", " with residual")]
    linear, adamw = "linear cross-entropy", "AdamW fp32"
    return [
        *_attention_goals(),
        *_shares("causal softmax", 0.90, 0.85),
        *(goal for norm in norms for goal in _shares(norm, 0.92, 0.85)),
        *(Goal(f"{norm} backward, speed against Liger", _speed(norm, "backward", "Liger"), 1.5) for norm in norms),
        # The strict reading: both passes together against one reading and one writing of the logits.
        Goal("cross-entropy both passes, times the floor", _floors("cross-entropy", "both"), 1.2, at_least=False),
        Goal("cross-entropy forward, times the floor", _floors("cross-entropy", "forward"), 1.2, at_least=False),
        Goal("cross-entropy backward, times the floor", _floors("cross-entropy", "backward"), 1.2, at_least=False),
        Goal(f"{linear}, times the floor of three products", _floors(linear, "both"), 1.15, at_least=False),
        Goal(f"{linear}, speed against Liger", _speed(linear, "both", "Liger"), 1.2),
        Goal(f"{linear}, extra memory in logits", _memory(linear), 1 / 8, at_least=False),
        *_shares("rotary", 0.92, 0.92),
        *_shares("SwiGLU", 0.92, 0.92),
        *_shares(adamw, 0.92, None),
        *_shares("AdamW bf16 with masters", 0.92, None),
        Goal(f"{adamw}, speed against torch's fused", _speed(adamw, "forward", "torch fused"), 1.05),
    ]


def judged(results: Results) -> list[dict[str, Any]]:
    """Return each goal with what the run says of it."""
    return [goal.judged(results) for goal in goals()]
