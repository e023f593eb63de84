"""What is each switch of `overlap` worth: steps with it on against steps with it off, in the same processes?

    python benchmarks/overlap.py                                        # two ranks on this machine, over gloo on a CPU
    python benchmarks/overlap.py --ranks 8 --hidden 4096 --layers 8 --sequence 4096 --precision bf16    # eight GPUs

A case is a switch in a layout that is all data, tensor or pipeline ranks. Each of its processes holds two trainers that
differ in nothing but the switch, and makes a step of the one and of the other in turn, first the one, then the other,
so that what else the machine does meets both alike. A step's time is that of the slowest rank. The ratio is the median
over pairs of steps, on / off, with the pairs' quartiles beside it; below 1 the switch wins. Waiting is the share of a
step that the ranks stand in torch.distributed, their mean: on CUDA what the computing stream waits for. Losses of both
are the same but for rounding, which is looked at.

Overlap needs something that sends while the processor computes, as a GPU's network card does. Gloo's threads compute:
where each rank has one core they take it from the products, and no gain is to be expected.

With --slept neither needs a core: products sleep for their time besides, and collectives are through no sooner than a
link of fixed speed has sent them. That measures what is begun when and waited for where, as a GPU with its network has
it, and no arithmetic. Messages of a pipeline are left out there.

Writes NAME.json, where --out is the name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from workers import machine, measured_by, write_result

PROCESS = Path(__file__).with_name("overlap_process.py")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gradients": ("data", {"overlap.gradients": True}, {}),
    "gradients, reduced in bf16": ("data", {"overlap.gradients": True}, {"train.reduce_dtype": "bf16"}),
    "tensor_chunks": ("tensor", {"overlap.tensor_chunks": 2}, {}),
    "tensor_chunks, sequence parallel": ("tensor", {"overlap.tensor_chunks": 2}, {"parallel.sequence": True}),
    "messages": ("pipeline", {"overlap.messages": True}, {}),
    "messages, interleaved": (
        "pipeline",
        {"overlap.messages": True},
        {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2},
    ),
}
"""The axis of all ranks, the switch turned on, and what else a case sets."""
OFF: dict[str, Any] = {"overlap.messages": False}
"""What off is where it is not the default."""
QUICK = {"layers": 4, "hidden": 32, "heads": 4, "sequence": 16, "vocab": 64, "micro_batch": 1, "pairs": 3, "warm": 1}


def settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe's keys that both sides of a case share."""
    axis, _, rest = CASES[name]
    copies = options.ranks if axis == "data" else 1
    shape = {f"model.{key}": getattr(options, key) for key in ("layers", "hidden", "heads", "sequence", "vocab")}
    layout = {} if axis == "data" else {f"parallel.{axis}": options.ranks}
    return {
        **shape,
        **layout,
        **rest,
        "precision": options.precision,
        "run.device": options.device,
        "train.micro_batch": options.micro_batch,
        "train.global_batch": options.micro_batch * options.microbatches * copies,
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the processes of a case measured, in one row."""
    _, on, _ = CASES[name]
    links = {"flops_per_s": 1e9 * options.gflops, "bytes_per_s": 1e6 * options.megabytes} if options.slept else None
    job = {
        "links": links,
        "settings": settings(name, options),
        "on": on,
        "off": {key: value for key, value in OFF.items() if key in on},
        "pairs": options.pairs,
        "warm": options.warm,
    }
    raw = measured_by(PROCESS, job, options.ranks)
    return {"axis": CASES[name][0], "on": on, "settings": job["settings"], **row(raw)}


def row(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a case's steps: `raw` has by side a list of [seconds, share that ranks wait]."""
    ratios = [on[0] / off[0] for on, off in zip(raw["on"], raw["off"], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    found: dict[str, Any] = {"ratio": median(ratios), "quartiles": [low, high]}
    for side in ("on", "off"):
        found[f"{side}_step_s"] = median(step[0] for step in raw[side])
        found[f"{side}_waiting"] = median(step[1] for step in raw[side])
    return found | {"loss_difference": raw["loss_difference"]}


def table(measured: dict[str, dict[str, Any]], ranks: int) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| switch | ranks | off | on | on / off (quartiles) | waiting off | on |", "|" + "---|" * 7]
    for name, one in measured.items():
        low, high = one["quartiles"]
        lines.append(
            f"| {name} | {ranks} {one['axis']} | {1e3 * one['off_step_s']:.0f} ms | {1e3 * one['on_step_s']:.0f} ms | "
            f"{one['ratio']:.3f} ({low:.3f} to {high:.3f}) | {one['off_waiting']:.1%} | {one['on_waiting']:.1%} |"
        )
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    sizes = {"layers": 4, "hidden": 256, "heads": 4, "sequence": 128, "vocab": 2048}
    for key, size in (sizes | {"micro-batch": 2, "microbatches": 4}).items():
        parser.add_argument(f"--{key}", type=int, default=size, metavar="N")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="steps of each side")
    parser.add_argument("--warm", type=int, default=2, metavar="N", help="steps of each side before these")
    parser.add_argument("--slept", action="store_true", help="products and links that are slept for")
    parser.add_argument("--gflops", type=float, default=4.0, metavar="N", help="of a rank with --slept, a second")
    parser.add_argument("--megabytes", type=float, default=12.0, metavar="N", help="of a link with --slept, a second")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overlap", metavar="NAME")
    options = parser.parse_args()
    if options.slept:
        options.cases = [name for name in options.cases if CASES[name][0] != "pipeline"]
    if options.quick:
        vars(options).update(QUICK)
    return options


def main() -> int:
    """Measure, print and write."""
    options = read_options()
    before = machine()
    measured = {name: measure(name, options) for name in options.cases}
    print(table(measured, options.ranks))
    given = {
        "pairs": options.pairs,
        "ranks": options.ranks,
        "slept": {"gflop_s": options.gflops, "mb_s": options.megabytes} if options.slept else None,
    }
    write_result(options.out.with_suffix(".json"), before, {**given, "measured": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
