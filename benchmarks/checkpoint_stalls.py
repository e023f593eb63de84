"""How much of its time does a run wait for its checkpoints, and how much slower does it train beside them?

    python benchmarks/checkpoint_stalls.py                      # below the system's directory for temporary files
    python benchmarks/checkpoint_stalls.py --root /scratch --ranks 1 2 --repetitions 7

`megalm train gpt-tiny` (1.1 million weights, 12 bytes each in a checkpoint) on the CPU, with an asynchronous save every
50 steps and without any, in turn, as whole programs. The first 50 steps, after which the first save begins, are left
out; behind them as many steps stand for each save. By the runs' own figures in `metrics.jsonl`,

- waited: the share of a run's time in which steps waited for saves (`checkpoint/stall_s`): for the copy of what is
  saved, and for the save before where it is still on its way;
- slowdown: the time of those steps and waits, against the same steps of the run without saves: what the writing thread
  takes from the processor is in it as well.

Each rank computes in one thread, so that two ranks on two cores leave none to the writing threads. Medians over the
repetitions, with the quartiles beside them. Writes NAME.json and prints a table, where --out is the name.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from checkpoint import spread
from workers import machine, write_result

from megalm.train.metrics_file import read_metrics

EVERY = 50
GOAL = 0.05
"""Of the time of a run may be spent on waiting, at most."""


def measure(data: Path, root: Path, ranks: int, job: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of runs with and without saves, whose directories lie below `root`, one at a time."""
    found: dict[str, list[dict[str, float]]] = {"saving": [], "not saving": []}
    for repetition in range(job["repetitions"]):
        for kind in list(found)[:: 1 if repetition % 2 else -1]:
            with tempfile.TemporaryDirectory(dir=root, prefix="run-") as place:
                every = EVERY if kind == "saving" else 0
                _megalm("train", "gpt-tiny", *settings(data, Path(place), ranks, job, every), "--nproc", str(ranks))
                found[kind].append(figures(read_metrics(Path(place) / "metrics.jsonl")))
    return {**summary(found["saving"], found["not saving"]), "runs": found}


def settings(data: Path, run: Path, ranks: int, job: dict[str, Any], every: int) -> list[str]:
    """Return what a run has otherwise than its recipe says."""
    values = {
        "run.dir": run,
        "run.preflight": "false",
        "data.path": data,
        "train.steps": EVERY * (job["saves"] + 1),
        "train.global_batch": job["batch"],
        "train.micro_batch": job["batch"] // ranks,
        "checkpoint.every": every,
        "checkpoint.at_end": "false",
        "evaluate.every": 0,
        "log.every": 10,
    }
    return [f"{key}={value}" for key, value in values.items()]


def _megalm(*arguments: str) -> None:
    command, environment = [sys.executable, "-m", "megalm", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"megalm {' '.join(arguments)}: ended with status {done.returncode}\n{done.stderr}")


def figures(records: list[dict[str, float]]) -> dict[str, float]:
    """Return, of the lines of a run behind its first 50 steps: seconds of steps, waits and saves, and these' bytes."""
    lines = [record for record in records if "time/step_s" in record]
    seconds = {"steps_s": 0.0, "stall_s": 0.0, "write_s": 0.0, "bytes": 0.0, "saves": 0.0}
    for before, line in pairwise(lines):
        if before["step"] < EVERY:
            continue
        seconds["steps_s"] += line["time/step_s"] * (line["step"] - before["step"])
        seconds["saves"] += "checkpoint/stall_s" in line
        for key in ("stall_s", "write_s", "bytes"):
            seconds[key] += line.get(f"checkpoint/{key}", 0.0)
    return seconds


def summary(saving: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, Any]:
    """Return the shares over the repetitions, and what a step, a wait and a save take."""
    whole = [run["steps_s"] + run["stall_s"] for run in saving]
    saves = sum(run["saves"] for run in saving)
    return {
        "waited": spread([run["stall_s"] / time for run, time in zip(saving, whole, strict=True)]),
        "slowdown": spread([time / run["steps_s"] - 1.0 for run, time in zip(others, whole, strict=True)]),
        "interval_s": median(run["steps_s"] / run["saves"] for run in saving),
        "stall_s": median(run["stall_s"] / run["saves"] for run in saving),
        "write_s": sum(run["write_s"] for run in saving) / saves,
        "megabytes": sum(run["bytes"] for run in saving) / saves / 1e6,
    }


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| ranks | 50 steps | a save | written in | waited for it | waited, of the time | goal | slowdown |",
        "|" + "---|" * 8,
    ]
    for ranks, one in measured.items():
        waited, slowdown = ("{:.2%} ({:.2%} to {:.2%})".format(*one[key]) for key in ("waited", "slowdown"))
        lines.append(
            f"| {ranks} | {one['interval_s']:.1f} s | {one['megabytes']:.1f} MB | {one['write_s']:.2f} s "
            f"| {one['stall_s'] * 1e3:.1f} ms | {waited} | {GOAL:.0%} | {slowdown} |"
        )
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="on the disk")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="rows of 128 tokens in a step, of all ranks")
    parser.add_argument("--saves", type=int, default=2, metavar="N", help="in a run")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint_stalls")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write."""
    options = read_options()
    before = machine()
    job = {key: getattr(options, key) for key in ("batch", "saves", "repetitions")}
    with tempfile.TemporaryDirectory(dir=options.root, prefix="benchmark-") as place:
        root, data = Path(place), Path(place) / "data"
        _megalm("data", "prepare", "--corpus", "builtin", "--vocab", "2048", "--out", str(data))
        measured = {str(ranks): measure(data, root, ranks, job) for ranks in options.ranks}
    print(table(measured))
    write_result(options.out.with_suffix(".json"), before, {**job, "every": EVERY, "goal": GOAL, "measured": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
