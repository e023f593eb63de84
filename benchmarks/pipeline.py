"""What share of a step do stages wait under each pipeline schedule, and what does the simulator say?

    python benchmarks/pipeline.py

One process a stage, over gloo, with the executor, the schedules and the messages of `megalm train`. The layers do not
compute: they wait for a fixed time, so that eight stages run side by side on two cores. What is measured is therefore
the schedule, the messages and the executor, not the speed of any arithmetic. A bubble is the share of all stages' time,
from the moment that all begin to the end of the last, in which their layers do not wait in place of computing; the
simulator's is for the same times and messages that take none. Of several steps the median one counts; the fastest and
the slowest stand beside it. On a busy machine give all its processes precedence: `chrt -r 5 python ...`.

Writes NAME.json and NAME.png, where --out is the name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from workers import machine, measured_by, write_result

from megalm.config.choices import CHOICES
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import simulate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GOAL = 0.05
"""Between a measured bubble and the simulator's."""
STYLES = ("-", (0, (4, 2)), (0, (1, 2)))
MARKERS = "osD^v<>p"
"""Of lines and dots: some schedules' lie on top of each other."""
PROCESS = Path(__file__).with_name("pipeline_process.py")


def simulated(name: str, stages: int, microbatches: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the simulator's step time, bubble and peak (in microbatches' activations of a whole stage)."""
    kind = SCHEDULES.get(name)
    schedule = kind(stages, microbatches, kind.fixed_chunks or options.virtual_stages)
    times = options.times
    cost = simulate(schedule, times["forward"], times["input"] + times["weight"], weight_time=times["weight"])
    return {"step_s": cost.makespan, "bubble": cost.bubble, "peak": max(cost.peak_live) / schedule.chunks}


def measure(stages: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return by schedule and number of microbatches what so many processes measured, beside the simulator's figures."""
    counts = [rounds * stages for rounds in options.rounds]
    job = {
        "stages": stages,
        "microbatches": counts,
        "schedules": options.schedules,
        "virtual_stages": options.virtual_stages,
        "times": options.times,
        "repeats": options.repeats,
    }
    raw = measured_by(PROCESS, job, stages)
    rows: dict[str, Any] = {}
    for name in options.schedules:
        for count in counts:
            repeats = sorted(raw[name][str(count)], key=lambda repeat: repeat["step_s"])
            rows.setdefault(name, {})[str(count)] = {
                **repeats[len(repeats) // 2],
                "fastest_step_s": repeats[0]["step_s"],
                "slowest_step_s": repeats[-1]["step_s"],
                "simulated": simulated(name, stages, count, options),
            }
    return rows


def table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| stages | microbatches | schedule | bubble | simulated | step | simulated | peak |", "|" + "---|" * 8]
    for stages, schedules in measured.items():
        for name, counts in schedules.items():
            for count, row in counts.items():
                wanted = row["simulated"]
                lines.append(
                    f"| {stages} | {count} | {name} | {row['bubble']:.1%} | {wanted['bubble']:.1%} | "
                    f"{1e3 * row['step_s']:.0f} ms | {1e3 * wanted['step_s']:.0f} ms | {wanted['peak']:g} |"
                )
    return "\n".join(lines)


def worst(measured: dict[str, dict[str, dict[str, Any]]]) -> float:
    """Return the largest difference between a measured bubble and the simulator's."""
    rows = [row for schedules in measured.values() for counts in schedules.values() for row in counts.values()]
    return max(abs(row["bubble"] - row["simulated"]["bubble"]) for row in rows)


def draw(measured: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw the bubbles over the microbatches, a column a number of stages: lines simulated, marks measured."""
    figure, axes = plt.subplots(1, len(measured), figsize=(4.5 * len(measured), 4.2), sharey=True, layout="constrained")
    for axis, (stages, schedules) in zip([axes] if len(measured) == 1 else axes, measured.items(), strict=True):
        for number, (name, counts) in enumerate(schedules.items()):
            places = [int(count) for count in counts]
            lines = [100 * row["simulated"]["bubble"] for row in counts.values()]
            dots = [100 * row["bubble"] for row in counts.values()]
            style = STYLES[number % len(STYLES)]
            axis.plot(places, lines, color=f"C{number}", linestyle=style, linewidth=3 - number % 2 * 1.4, label=name)
            axis.plot(places, dots, MARKERS[number % len(MARKERS)], color=f"C{number}", markersize=5, fillstyle="none")
        places = [int(count) for count in next(iter(schedules.values()))]
        axis.set(title=f"{stages} stages", xscale="log", xlabel="microbatches", xticks=places)
        axis.set_xticklabels([str(place) for place in places])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("bubble, % of all stages' time")
    figure.suptitle("lines: simulated, marks: measured", fontsize="medium")
    figure.axes[-1].legend(fontsize="small")
    first.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="microbatches a stage")
    parser.add_argument("--schedules", nargs="+", choices=CHOICES["schedule"], default=list(CHOICES["schedule"]))
    parser.add_argument("--virtual-stages", type=int, default=2, metavar="N", help="chunks where a schedule is open")
    times = parser.add_argument_group("seconds that a whole stage waits for a microbatch")
    for name in ("forward", "input", "weight"):
        times.add_argument(f"--{name}", type=float, default=0.04, metavar="S")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="steps, of which the median one counts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pipeline", metavar="NAME")
    options = parser.parse_args()
    options.times = {name: getattr(options, name) for name in ("forward", "input", "weight")}
    return options


def main() -> int:
    """Measure, print, write and draw; 1 where a bubble is further from the simulator's than the goal."""
    options = read_options()
    before = machine()
    measured = {str(stages): measure(stages, options) for stages in options.stages}
    print(table(measured))
    far = worst(measured)
    print(f"\nfurthest from the simulator: {100 * far:.1f} points, goal {100 * GOAL:.0f}")
    given = {
        "repeats": options.repeats,
        "layers": "wait instead of computing",
        "times_s": options.times,
        "virtual_stages": options.virtual_stages,
        "goal": GOAL,
        "furthest_points": round(100 * far, 2),
    }
    write_result(options.out.with_suffix(".json"), before, {**given, "measured": measured})
    draw(measured, options.out.with_suffix(".png"))
    return int(far > GOAL)


if __name__ == "__main__":
    sys.exit(main())
