"""Our kernels against everyone else's who is installed, each pass by itself, beside what the device could do.

    python benchmarks/kernels.py                              # on a GPU, all cases: some minutes
    python benchmarks/kernels.py --only attention rotary      # cases whose name or operation begins so
    python benchmarks/kernels.py --only adamw --keep          # the other cases stay in the file as they are
    python benchmarks/kernels.py --device cpu                 # tries the program with small sizes, measures nothing

All contestants run in one process on the same random inputs. Each is checked against the plain formula in fp32 before
it is timed; one that is wrong, fails or is not installed is listed with the reason. They take turns in a new order each
round; `device_timing` says how a pass is timed, `kernel_cases` what it costs at least, `peers` who takes part,
`kernel_goals` what is wanted. The floor is the longer of the operations at the rate of a matrix product and the bytes
at that of a copy, both measured in the same run. Figures go to a JSON file, and from it into a picture.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from device_timing import measured_rates
from kernel_cases import cases
from kernel_goals import judged
from kernel_race import release, run_case
from peers import OURS
from roofline import draw

NOT_MEASURED = "device cpu: small sizes that try the program; no time here means anything"


def rows_of(name: str, result: Mapping[str, Any]) -> list[str]:
    """Return the table's lines of a case, the fastest first."""
    lines = []
    for pass_name, figures in result["passes"].items():
        ordered = sorted(figures["contestants"].items(), key=lambda item: item[1]["median_us"])
        for contestant, x in ordered:
            rate = f"{x['tflop_s']:7.0f} TFLOP/s" if figures["bound"] == "flops" else f"{x['of_floor']:7.1%} of copy"
            late = f"  {x['late']} of {x['samples']} late" if x["late"] else ""
            lines.append(
                f"{name:<30} {pass_name:<8} {contestant:<14} {x['median_us']:10.1f} "
                f"{x['low_us']:10.1f} {x['high_us']:10.1f} {rate:<16} {1 / x['of_floor']:6.2f} "
                f"{max(x['errors'].values()):8.1e} {x['host_us']:8.1f}{late}"
            )
    lines += [f"{name:<30} {'-':<8} {contestant:<14} {why}" for contestant, why in result["missing"].items()]
    return lines


HEADER = (
    f"{'case':<30} {'pass':<8} {'contestant':<14} {'median us':>10} {'quartile':>10} {'quartile':>10} "
    f"{'rate':<16} floors {'error':>8} {'host us':>8}"
)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    facts: dict[str, Any] = {
        "device": platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        }
    for name in ("triton", "liger-kernel", "quack-kernels", "flash-attn-4"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    return facts


def kept_cases(earlier: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cases of an earlier run; ValueError if that was on another device or with other versions."""
    for key, value in results["machine"].items():
        if key != "date" and earlier["machine"].get(key) != value:
            raise ValueError(f"--keep: the file's {key} is {earlier['machine'].get(key)}, here it is {value}")
    return dict(earlier["cases"])


def driver_version() -> str | None:
    """Return the driver's version as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name or operation begins so")
    parser.add_argument("--keep", action="store_true", help="keep the file's cases that are not measured now")
    parser.add_argument("--rounds", type=int, help="samples of each contestant and pass; default 30, on the CPU 2")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/kernels.json; none on the CPU")
    return parser.parse_args()


def main() -> int:
    """Measure, print the tables, write the results; 1 where a goal that could be judged is missed."""
    options = read_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU; --device cpu tries the program without one", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    measured = options.device == "cuda"
    rounds = options.rounds or (30 if measured else 2)
    chosen = [
        case
        for case in cases(small=not measured)
        if not options.only or any(case.name.startswith(name) or case.op.startswith(name) for name in options.only)
    ]
    if not chosen:
        print(f"error: --only {' '.join(options.only)}: no case has such a name", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # the check's fp32 is fp32
    out = options.out or (Path(__file__).parent / "results" / "kernels.json" if measured else None)
    rates = measured_rates(device, rounds)
    results: dict[str, Any] = {
        "measurement": measured,
        "machine": machine(device),
        "rates": rates,
        "rounds": rounds,
        "cases": {},
    }
    if options.keep and out is not None and out.exists():
        results["cases"] = kept_cases(json.loads(out.read_text("utf-8")), results)
    if not measured:
        results["note"] = NOT_MEASURED
        print(NOT_MEASURED)
    print(*(f"{key} {value}" for key, value in results["machine"].items()), sep=", ")
    print(f"copy {1e-12 * rates['copy_bytes_s']:.3f} TB/s, bf16 product {1e-12 * rates['product_flop_s']:.0f} TFLOP/s")
    print(HEADER)
    for case in chosen:
        results["cases"][case.name] = {**run_case(case, device, rates, rounds), "rates": rates}
        print(*rows_of(case.name, results["cases"][case.name]), sep="\n", flush=True)
        release(device)
        write(out, results)
    results["goals"] = judged(results)
    print("\ngoals")
    for goal in results["goals"]:
        print(goal["line"])
    write(out, results)
    if out is not None:
        draw(results, out.with_suffix(".png"))
        print(f"\nwritten: {out}, {out.with_suffix('.png')}")
    ours = [OURS in x["missing"] for x in results["cases"].values()]
    return int(any(ours) or any(goal["met"] is False for goal in results["goals"]))


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write what has been measured so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
