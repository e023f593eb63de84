"""How large the model is, how much arithmetic a token costs, how fast the run goes, how much memory it takes.

Owns the counting formulas, the table of peak rates and the meter. It prints and writes nothing: `tracking`
does. torch is imported only where a device is asked, so that counting works without it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megalm.config.model import ModelSection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParameterCount:
    """Logical parameters of each part of the model; padding of the vocabulary is not counted."""

    embedding: int
    position: int
    attention: int
    mlp: int
    norms: int
    head: int
    """0 when the head is tied to the embedding."""
    mtp: int
    """What joins the blocks that predict further tokens to the model; the blocks themselves are counted above."""
    idle: int = 0
    """Those among the MLPs' that a token does not use: of the experts that it does not go to."""

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return sum(asdict(self).values()) - self.idle

    @property
    def active(self) -> int:
        """Those that a token uses."""
        return self.total - self.idle


def count_parameters(model: ModelSection, vocab: int) -> ParameterCount:
    """Return the exact parameter count of each part, from the recipe alone. `vocab` is unpadded."""
    norm = model.hidden * (2 if model.norm == "layernorm" and model.bias else 1)
    attention = sum(model.attention_matrices.values())
    attention += model.projected_width * model.has_qkv_bias + model.hidden * model.has_out_bias
    attention += model.heads * model.attention_sinks
    if model.position == "t5":
        layers = sum(model.knows_positions(layer) for layer in range(model.blocks))
        positions = layers * model.heads * model.relative_buckets
    else:
        positions = model.sequence * model.hidden if model.position == "learned" else 0
    norms = model.blocks * {"pre": 2, "post": 2, "sandwich": 4}[model.norm_place]
    norms += (model.norm_place != "post") + model.embedding_norm
    attention_norms = 2 * model.head_size * model.qk_norm + (model.kv_rank or 0) + (model.q_rank or 0)
    return ParameterCount(
        embedding=vocab * model.hidden,
        position=positions,
        attention=model.blocks * attention,
        mlp=sum(_mlp_parameters(model, layer) for layer in range(model.blocks)),
        norms=norms * norm + model.blocks * attention_norms,
        head=0 if model.tie_embeddings else vocab * model.hidden,
        mtp=model.mtp_depth * (2 * model.hidden**2 + (2 + (model.norm_place != "post")) * norm),
        idle=sum(_idle_parameters(model, layer) for layer in range(model.blocks)),
    )


def _mlp_parameters(model: ModelSection, layer: int) -> int:
    """Return the parameters of a layer's MLP, or of its router, experts and shared experts."""
    if not model.has_experts(layer):
        return _dense_parameters(model, model.feed_forward)
    experts, ups = model.experts or 0, 2 if model.has_gated_activation else 1
    each = model.hidden * (ups + 1) * model.expert_features
    shared = _dense_parameters(model, model.shared_features) if model.shared_experts else 0
    return experts * (model.hidden + each) + shared


def _dense_parameters(model: ModelSection, features: int) -> int:
    up_width = features * (2 if model.has_gated_activation else 1)
    return model.hidden * (up_width + features) + (up_width + model.hidden) * model.bias


def _idle_parameters(model: ModelSection, layer: int) -> int:
    """Return the parameters of the experts that a token does not go to in a layer."""
    if not model.has_experts(layer):
        return 0
    ups = 2 if model.has_gated_activation else 1
    others = (model.experts or 0) - model.experts_per_token
    return others * model.hidden * (ups + 1) * model.expert_features


def flops_per_token(model: ModelSection, vocab: int, sequence: int | None = None) -> float:
    """Return the model FLOPs of one token's forward and backward pass in rows of `sequence` tokens (None: whole ones).

    6 per weight of a matrix product (2 forward, 4 backward), the head included (tied or not, and once more for each
    further token that is predicted), the embedding look-up not, and of experts those that a token goes to; plus
    12 * layers * heads * head_size * sequence for the scores and their product with the values (where values have
    another size, the mean of both), counted as full squares: what masks and windows leave out is *not* subtracted.
    Recomputed activations, norms, biases and element-wise work do not count. This is the convention of PaLM (Chowdhery
    et al. 2022, appendix B) and of Megatron-LM (Narayanan et al. 2021, equation 2, without its recomputation), so
    figures compare with theirs.
    """
    attention_weights = model.blocks * sum(model.attention_matrices.values())
    mlp_weights = sum(_mlp_products(model, layer) for layer in range(model.blocks))
    joins = 2 * model.mtp_depth * model.hidden**2
    matmul_weights = attention_weights + mlp_weights + joins + (1 + model.mtp_depth) * vocab * model.hidden
    scores_width = model.blocks * model.heads * (model.head_size + model.value_size)
    return 6.0 * matmul_weights + 6.0 * scores_width * (sequence or model.sequence)


def _mlp_products(model: ModelSection, layer: int) -> int:
    """Return the weights that a token is multiplied by in a layer's MLP, its biases left out."""
    ups = 2 if model.has_gated_activation else 1
    if not model.has_experts(layer):
        return model.hidden * (ups + 1) * model.feed_forward
    features = model.experts_per_token * model.expert_features + model.shared_features
    return model.hidden * ((ups + 1) * features + (model.experts or 0))


@dataclass(frozen=True)
class Peak:
    """The rate, in FLOP/s, that MFU divides by, for one rank, and where the figure comes from."""

    flops: float
    source: str


# Dense peaks in TFLOP/s from the vendors' data sheets, without sparsity. The first entry whose words all
# stand in the device's name counts, so longer names stand first. What is missing is measured instead.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"fp32": 75.0, "tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0, "fp64": 37.0},
    "H200": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp64": 67.0},
    "H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0, "fp64": 51.0},
    "H100 NVL": {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5, "fp64": 60.0},
    "H100": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp64": 67.0},
    "H800": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp64": 1.0},
    "GH200": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp64": 67.0},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0, "fp64": 19.5},
    "A800": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0, "fp64": 9.7},
    "A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7},
    "A10G": {"fp32": 31.5, "tf32": 35.0, "bf16": 70.0, "fp16": 70.0},
    "A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0},
    "L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0},
    "L40": {"fp32": 90.5, "tf32": 90.5, "bf16": 181.0, "fp16": 181.0},
    "L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0},
    "V100": {"fp32": 15.7, "fp16": 125.0, "fp64": 7.8},
    "T4": {"fp32": 8.1, "fp16": 65.0},
    "MI300X": {"fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4, "fp64": 163.4},
}

_MEASURE_S = 0.15
_MEASURE_SIZE = {"cpu": 384, "cuda": 4096}


def known_peak(device_name: str, precision: str) -> Peak | None:
    """Return the data sheet's dense peak of a GPU by its reported name, or None where the table lacks it.

    `precision` is "fp32", "tf32", "bf16", "fp16" or "fp64".
    """
    words = set(device_name.replace("-", " ").split())
    if "Laptop" in words:  # another chip under the same name
        return None
    for name, peaks in PEAK_TFLOPS.items():
        if set(name.split()) <= words and precision in peaks:
            return Peak(peaks[precision] * 1e12, f"{name} {precision} dense, data sheet")
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return what MFU divides by on this device: the data sheet's dense peak, or else a measured rate.

    The measurement takes at most about 0.2 s and is the rate of one process on its own: ranks that share
    cores cannot all reach it. float32 on CUDA counts as tf32 when torch is allowed to use it.
    """
    import torch

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    precision = names[dtype]
    if device.type == "cuda":
        if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
            precision = "tf32"
        known = known_peak(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return known
    return _measured_peak(device, dtype, precision)


def _measured_peak(device: torch.device, dtype: torch.dtype, precision: str) -> Peak:
    """Return the best rate of a square matrix product seen within `_MEASURE_S` seconds."""
    import torch

    def timed_product() -> float:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    size = _MEASURE_SIZE[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    b, out = torch.ones_like(a), torch.empty_like(a)
    timed_product()
    end, best = time.perf_counter() + _MEASURE_S, float("inf")
    while time.perf_counter() < end:
        best = min(best, timed_product())
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    return Peak(2.0 * size**3 / best, f"measured, {size}x{size} {precision} matrix product{threads}")


def peak_memory_bytes(device: torch.device) -> int:
    """Return this rank's peak memory in bytes: what torch allocated on CUDA, the resident set on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(device: torch.device) -> int:
    """Return what this rank uses now, in bytes: as `peak_memory_bytes` counts it."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class Speed:
    """The mean over the steps since the last measurement."""

    step_s: float
    tokens_per_s: float
    """Of all ranks together."""
    tflops: float
    """Model TFLOP/s of one rank."""
    tflops_total: float
    mfu: float
    """Model FLOPs of one rank over its peak: 0 to 1."""
    time_left_s: float

    def record(self) -> dict[str, float]:
        """Return the entries of a line of metrics."""
        return {
            "time/step_s": self.step_s,
            "perf/tokens_per_s": self.tokens_per_s,
            "perf/tflops": self.tflops,
            "perf/mfu": self.mfu,
        }


class Throughput:
    """A meter of steps: call `start` before the first one, and `measure` after those that are logged.

    Measure after the step's loss was read: on CUDA that is what waits for the device. Time under `paused`
    (evaluation, checkpoints), and from `pause` to `go_on` (compilation), does not count. `tokens_before(step)` says how
    many tokens all steps before that one take, from step 0, and `flops_per_token(step)` what each of its own costs. The
    time left goes by a running mean of a token's time, so that one slow step does not move it much.
    """

    def __init__(
        self,
        *,
        tokens_before: Callable[[int], int],
        flops_per_token: Callable[[int], float],
        world_size: int,
        peak: Peak,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tokens_before = tokens_before
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._peak = peak
        self._clock = clock
        self._smooth_token_s = 0.0
        self._measurements = 0
        self._step = 0
        self._mark = clock()
        self._pauses = 0
        self._paused_at = 0.0

    def start(self, step: int) -> None:
        """Start the clock; `step` steps are done."""
        self._step = step
        self._mark = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the measurement."""
        self.pause()
        try:
            yield
        finally:
            self.go_on()

    def pause(self) -> None:
        """Leave the time until as many `go_on` out of the measurement."""
        if self._pauses == 0:
            self._paused_at = self._clock()
        self._pauses += 1

    def go_on(self) -> None:
        """End a pause; one within another ends with it."""
        assert self._pauses, "the meter is not paused"
        self._pauses -= 1
        if self._pauses == 0:
            self._mark += self._clock() - self._paused_at

    def measure(self, step: int, last_step: int) -> Speed:
        """Return the mean speed since the last call; `step` steps are done, the run ends at `last_step`."""
        now = self._clock()
        assert step > self._step, f"no step was done since the last measurement: {step} after {self._step}"
        steps = range(self._step, step)
        seconds = max(now - self._mark, 1e-9 * len(steps))
        taken = [self._tokens_before(each + 1) - self._tokens_before(each) for each in steps]
        flops = sum(count * self._flops_per_token(each) for each, count in zip(steps, taken, strict=True))
        token_s = seconds / sum(taken)
        self._step, self._mark = step, now
        self._measurements += 1
        if self._measurements <= 2:  # the first steps hold what is done once, so the second measurement replaces them
            self._smooth_token_s = token_s
        else:
            kept = 0.9 ** len(steps)
            self._smooth_token_s = kept * self._smooth_token_s + (1.0 - kept) * token_s
        left = self._tokens_before(max(step, last_step)) - self._tokens_before(step)
        total = flops / seconds
        return Speed(
            step_s=seconds / len(steps),
            tokens_per_s=sum(taken) / seconds,
            tflops=total / self._world_size / 1e12,
            tflops_total=total / 1e12,
            mfu=total / self._world_size / self._peak.flops,
            time_left_s=self._smooth_token_s * left,
        )
