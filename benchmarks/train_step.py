"""Our training step against a plain PyTorch loop of the same model, and tokens a second of layouts.

    python benchmarks/train_step.py                                       # on the CPU
    python benchmarks/train_step.py --device cuda --precision bf16 --shapes gpt-124m

One process: both train the same weights on the same batches; their losses must agree before anything is timed. Then
they take turns in the same process, the order alternating, and the median of the pairs' ratios counts: what else the
machine does meets both alike. On the CPU a pair is measured in processor time too, which other programs do not add to.

Layouts: as many local processes as each needs train the first shape, one layout after the other.

    python benchmarks/train_step.py --device cuda --precision bf16 --model gpt-1b --sequences 2048 4096

    python benchmarks/train_step.py --device cuda --precision bf16 --model llama-8b --sequences 4096 --micro-batch 1 \
        --layers 4 --fp8 tensorwise rowwise rowwise_with_gw_hp

    python benchmarks/train_step.py --compile                             # train.compile against eager, as above

A model: the recipe of that name on one device, with the fused kernels and without, at each length of sequence: tokens
a second, peak memory, and MFU, the model FLOPs of `megalm.train.monitor.flops_per_token` (6 a weight and token, causal
attention counted as full squares, nothing that is recomputed) over the device's dense peak of the precision. With
`--fp8` its blocks are compiled, and each recipe of `train.fp8` has a row beside bf16; over the peak of bf16 too.

`step_process.py` is what runs in each of the processes, `plain.py` the plain loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_process import CHECKED_STEPS, LOSS_TOLERANCE, WARM_STEPS
from workers import machine, measured_by

from megalm.config.choices import CHOICES
from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.data.token_file import TokenFileWriter

GOAL = 1.02
PROCESS = Path(__file__).with_name("step_process.py")

# Beyond a recipe: its batch is cut down to a step that can be repeated often, the rest is what the peer can do too.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-tiny": ("gpt-tiny", {"model.vocab": 2048, "train.global_batch": 16, "train.micro_batch": 4}),
    "gpt-23m": (
        "gpt-tiny",
        {
            "model.norm": "layernorm",
            "model.activation": "gelu",
            "model.position": "learned",
            "model.bias": True,
            "model.layers": 6,
            "model.hidden": 512,
            "model.heads": 8,
            "model.sequence": 256,
            "model.vocab": 8192,
            "train.global_batch": 2,
            "train.micro_batch": 1,
        },
    ),
    "gpt-124m": ("gpt-124m", {"train.global_batch": 64}),
}
LAYOUTS = "t1p1d1z0 t1p1d2z0 t1p1d2z1 t1p1d2z2 t1p1d2z3 t2p1d1z0 t2p1d1z0s t1p2d1z0 t2p2d1z0 t2p1d2z1 t1p2d2z1 t1p1d4z1"
_LAYOUT = re.compile(r"t(\d+)p(\d+)d(\d+)z([0-3])(s?)")


@dataclass(frozen=True)
class Layout:
    """How many processes share the model, and how."""

    name: str
    tensor: int
    pipeline: int
    data: int
    zero: int
    sequence: bool

    @classmethod
    def read(cls, name: str) -> Layout:
        """Return the layout of a name such as t2p1d2z1; a final s is sequence parallelism."""
        match = _LAYOUT.fullmatch(name)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no layout; write t2p1d2z1 for tensor 2, pipeline 1, data 2, ZeRO 1, t2p1d1z0s with "
                "sequence parallelism"
            )
        tensor, pipeline, data, zero = map(int, match.groups()[:4])
        return cls(name, tensor, pipeline, data, zero, match[5] == "s")

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.tensor * self.pipeline * self.data

    def overrides(self) -> dict[str, Any]:
        """Return the layout as keys of a recipe."""
        return {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.sequence": self.sequence,
            "zero.stage": self.zero,
        }


def recipe(shape: str, layout: Layout, precision: str) -> RunConfig:
    """Return the recipe that is measured."""
    base, overrides = SHAPES[shape]
    fixed = {"precision": precision, "optim.lr": 1e-4, "lr_schedule.kind": "constant", "lr_schedule.warmup_steps": 0}
    values = {**fixed, **overrides, **layout.overrides()}
    return load_recipe(base, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def measured(kind: str, config: RunConfig, world_size: int, repeats: int, options: argparse.Namespace) -> Any:
    """Return the result of a job, done by as many fresh processes as it needs; SystemExit where they fail."""
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "random.tokens"
        write_tokens(tokens, config, repeats * options.steps_a_side)
        job = {
            "kind": kind,
            "config": config.model_dump_json(),
            "tokens": str(tokens),
            "repeats": repeats,
            "steps_a_side": options.steps_a_side,
            "threads": options.threads,
        }
        return measured_by(PROCESS, job, world_size)


def write_tokens(path: Path, config: RunConfig, steps: int) -> None:
    """Write random tokens, enough for one epoch of `steps` steps and those before them, but at most 2**24."""
    vocab = config.model.vocab
    assert vocab is not None, "a measured shape gives its vocabulary"
    wanted = (CHECKED_STEPS + WARM_STEPS + steps) * config.train.global_batch * config.model.sequence + 1
    generator = np.random.default_rng(config.seed)
    with TokenFileWriter(path, vocab, "00" * 32) as writer:
        writer.append(generator.integers(vocab, size=min(wanted, 2**24), dtype=np.int64))


def compare_shape(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a shape at one process; return the figures and print their rows."""
    config = recipe(shape, Layout.read("t1p1d1z0"), options.precision)
    raw = measured("compiled" if options.compile else "pairs", config, 1, options.pairs, options)
    kept = ("loss_difference", "parameters", "tokens_per_step", "cold_start_s")
    figures = {key: raw[key] for key in kept if key in raw}
    clocks = ("wall_s", "processor_s") if options.device == "cpu" else ("wall_s",)
    for clock in clocks:
        ours, plain = raw[clock]["ours"], raw[clock]["plain"]
        ratios = [a / b for a, b in zip(ours, plain, strict=True)]
        low, high = median_interval(ratios)
        ratio = {
            "median": statistics.median(ratios), "low": low, "high": high, "min": min(ratios), "max": max(ratios)
        }  # fmt: skip
        figures[clock] = {"ours": statistics.median(ours), "plain": statistics.median(plain), "ratio": ratio}
        print(
            f"{shape:<10} {raw['parameters'] / 1e6:8.1f} M  {clock[:-2]:<9} {1e3 * figures[clock]['ours']:9.2f} "
            f"{1e3 * figures[clock]['plain']:9.2f}   {ratio['median']:6.3f}  {low:6.3f} to {high:.3f}  "
            f"{ratio['min']:6.3f} {ratio['max']:6.3f}",
            flush=True,
        )
    return figures | {"pairs": options.pairs, "steps_a_side": options.steps_a_side}


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the bounds between which the true median lies with a probability of about 95%.

    They are two of the sorted values: those whose ranks are 1.96 binomial deviations from the middle.
    """
    ordered, reach = sorted(values), 1.96 * math.sqrt(len(values)) / 2
    low = max(0, math.floor(len(values) / 2 - reach))
    return ordered[low], ordered[-1 - low]


def measure_layout_rate(layout: Layout, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a layout with the first shape; return the figures and print their row."""
    config = recipe(options.shapes[0], layout, options.precision)
    raw = measured("layout", config, layout.world_size, options.layout_steps, options)
    seconds = raw["wall_s"]
    step_s = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    rate = raw["tokens_per_step"] / step_s["median"]
    print(
        f"{layout.name:<10} {layout.world_size:9}  {1e3 * step_s['median']:9.2f} {1e3 * step_s['min']:9.2f}  "
        f"{rate:12.0f}  {raw['first_loss']:.6f}",
        flush=True,
    )
    return {
        "processes": layout.world_size,
        "step_s": step_s,
        "tokens_per_s": rate,
        "first_loss": raw["first_loss"],
    }


def measure_model(options: argparse.Namespace, results: dict[str, Any], out: Path) -> None:
    """Measure a recipe with and without fused kernels at each length; print the rows, fill and write the results."""
    print(f"\n{options.model}, one device, micro-batch of {options.micro_batch} sequences")
    print(
        "sequence  kernels    fp8                    step ms      tokens/s   TFLOP/s     MFU   peak GiB  loss of step 1"
    )
    choices = ["fused"] * (options.device == "cuda") + ["reference"] * (not options.fp8)
    for sequence in options.sequences:
        for kernels, fp8 in itertools.product(choices, ("none", *options.fp8)):
            overrides = {
                "precision": options.precision,
                "model.sequence": sequence,
                "model.kernels": kernels,
                "train.compile": bool(options.fp8),
                "train.fp8": fp8,
                "zero.stage": 0,
                "train.micro_batch": options.micro_batch,
                "train.global_batch": 2 * options.micro_batch,
                "lr_schedule.warmup_steps": 0,
                **({} if options.layers is None else {"model.layers": options.layers}),
                "parallel.tensor": 1,
                "parallel.sequence": False,
            }
            config = load_recipe(options.model, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
            raw = measured("layout", config, 1, options.layout_steps, options)
            step_s = statistics.median(raw["wall_s"])
            rate = raw["tokens_per_step"] / step_s
            flops = rate * raw["flops_per_token"]
            row = {**raw, "step_s": step_s, "tokens_per_s": rate, "flops": flops, "mfu": flops / raw["peak_flops"]}
            name = f"sequence {sequence}, {kernels}" + (f", {fp8}" if options.fp8 else "")
            results.setdefault("model", {"name": options.model})[name] = row
            print(
                f"{sequence:8}  {kernels:<9}  {fp8:<18} {1e3 * step_s:11.1f}  {rate:12.0f}  {flops / 1e12:8.1f}  "
                f"{row['mfu']:6.1%}  {raw['peak_bytes'] / 2**30:9.1f}  {raw['first_loss']:.6f}",
                flush=True,
            )
            write(out, results)
    print(f"MFU: of {raw['peak_flops'] / 1e12:.1f} TFLOP/s ({raw['peak_source']})\nwritten: {out}")


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(LOSS_TOLERANCE), default="fp32")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["gpt-tiny", "gpt-23m"])
    parser.add_argument("--layouts", nargs="*", type=Layout.read, help=f"default on the CPU: {LAYOUTS}")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of measurements at one process")
    parser.add_argument("--steps-a-side", type=int, default=1, help="steps in each half of a pair")
    parser.add_argument("--layout-steps", type=int, default=10, help="measured steps of each layout")
    parser.add_argument("--compile", action="store_true", help="our compiled step against our eager one")
    parser.add_argument("--model", help="measure this recipe on one device instead; it must name its vocabulary")
    parser.add_argument("--sequences", type=int, nargs="+", default=[2048, 4096], help="lengths for --model")
    parser.add_argument(
        "--fp8", nargs="+", choices=CHOICES["fp8"][1:], default=[], help="measure these compiled, beside bf16"
    )
    parser.add_argument("--layers", type=int, help="layers of --model, so that it fits on one device")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a microbatch for --model")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in each process")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train_step_DEVICE.json")
    return parser.parse_args()


def main() -> int:
    """Measure, print the tables, write the results; 1 where a median ratio misses the goal."""
    options = read_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU; use --device cpu", file=sys.stderr)
        return 2
    if options.fp8 and (options.device == "cpu" or options.model is None):
        print("--fp8: a GPU's blocks are compared; add --device cuda --model NAME", file=sys.stderr)
        return 2
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the processes take a GPU where they see one
    if options.layouts is None:
        all_layouts = options.device == "cpu" and not options.compile
        options.layouts = [Layout.read(name) for name in LAYOUTS.split()] if all_layouts else []
    kind = "compiled" if options.compile else options.model
    name = "_".join(filter(None, ("train_step", kind, "fp8" if options.fp8 else None, options.device)))
    out = options.out or Path(__file__).parent / "results" / f"{name}.json"
    facts = {"threads_a_process": options.threads, "precision": options.precision, "deepspeed": version("deepspeed")}
    results: dict[str, Any] = {"machine": {**machine(), **facts}}
    print(*(f"{key} {value}" for key, value in results["machine"].items()), sep=", ")
    if options.model is not None:
        measure_model(options, results, out)
        return 0
    goal = 1.0 if options.compile else GOAL
    results |= {"goal": goal, "one_process": {}}
    ours, plain = ("compiled", "eager") if options.compile else ("ours", "plain")
    print(f"\none process: {options.pairs} pairs, ratio of a step's time, {ours} to {plain}, goal {goal}")
    print(f"shape      parameters  clock   {ours:>8} ms  {plain:>5} ms    ratio  95% of the median     min    max")
    for shape in options.shapes:
        results["one_process"][shape] = compare_shape(shape, options)
        write(out, results)
    if options.layouts:
        print(f"\nlayouts of {options.shapes[0]}: tensor, pipeline, data, ZeRO, s = sequence parallelism")
        print("layout     processes    step ms    min ms      tokens/s  loss of step 1")
    results["layouts"] = {"shape": options.shapes[0]}
    for layout in options.layouts:
        results["layouts"][layout.name] = measure_layout_rate(layout, options)
        write(out, results)
    print(f"\nwritten: {out}")
    clock = "processor_s" if options.device == "cpu" else "wall_s"
    ratios = [figures[clock]["ratio"]["median"] for figures in results["one_process"].values()]
    return int(any(ratio > goal for ratio in ratios))


def write(path: Path, results: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
