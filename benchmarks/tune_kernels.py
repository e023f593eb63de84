"""Find the launch settings of kernels for the GPU at hand and write them into kernels/tables/.

    python benchmarks/tune_kernels.py --list                       # what can be tuned, with how many settings
    python benchmarks/tune_kernels.py attention/forward norm       # one kernel, all of a file
    python benchmarks/tune_kernels.py --all --dry-run              # measure, write nothing
    python benchmarks/tune_kernels.py --format                     # rewrite the tables in their stable form

For each size that `tunings` declares every setting of the kernel's grid is tried: its results are checked against fp32
as the benchmark checks its contestants, then the pass that the kernel is part of is timed. The best few and the present
row then take turns; a row is written for this architecture only if it beats the present one by more than a hundredth.
Rows of other architectures, and the rows for all, stay as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from device_timing import Samples
from kernel_race import TOLERANCE, Contestant, Judge, Race, reason, release
from tunings import TUNINGS, Point, Settings, Tuning

from megalm.kernels import launch

TABLES = Path(launch.__file__).parent / "tables"
GAIN = 1.01
FINALISTS = 4


@contextmanager
def overridden(tuning: Tuning, chosen: Settings | None, sizes: set[int]) -> Iterator[None]:
    """Launch its kernel with these settings (None: with those of its table); `sizes` gets the sizes it is asked for."""
    original = launch.settings

    def settings(asked_file: str, asked_kernel: str, size: int = 0) -> Settings:
        if (asked_file, asked_kernel) != (tuning.file, tuning.kernel):
            asked_for = tuning.asked_for_by.get(asked_kernel, {}) if asked_file == tuning.file else {}
            return {**original(asked_file, asked_kernel, size), **asked_for}
        sizes.add(size)
        return original(asked_file, asked_kernel, size) if chosen is None else dict(chosen)

    launch.settings = settings
    try:
        yield
    finally:
        launch.settings = original


def time_settings(
    tuning: Tuning, point: Point, tried: Sequence[Settings | None], samples: int, judge: Judge, race: Race
) -> tuple[list[tuple[float, Settings | None]], dict[str, int]]:
    """Return (seconds, settings) of those that work, the fastest first, and how many fail by the reason."""
    call = point.case.operation.ours(point.case.sizes)
    failed: dict[str, int] = {}
    running: list[tuple[Settings | None, Samples]] = []
    sizes: set[int] = set()
    for chosen in tried:
        try:
            with overridden(tuning, chosen, sizes):
                worst = max(judge.errors(call).values())
                if not worst <= TOLERANCE:
                    raise ArithmeticError(f"wrong by {worst:.0%}")
                race.sample(Contestant(call, [], {}), point.pass_name, Samples())
            running.append((chosen, Samples()))
        except Exception as error:  # most often more shared memory or registers than there are
            failed[reason(error)[:60]] = failed.get(reason(error)[:60], 0) + 1
    assert sizes, f"{point.case.name} does not launch {tuning.name}"
    limit = point.up_to
    assert limit is None or max(sizes) <= limit, f"{tuning.name} is asked for sizes {sizes}, the row is up to {limit}"
    generator = random.Random(0)
    for _ in range(samples):
        generator.shuffle(running)
        for chosen, taken in running:
            with overridden(tuning, chosen, sizes):
                race.sample(Contestant(call, [], {}), point.pass_name, taken)
    timed = [(statistics.median(taken.device_s), chosen) for chosen, taken in running]
    return sorted(timed, key=lambda item: item[0]), failed


def best_settings(tuning: Tuning, point: Point, device: torch.device, rounds: int) -> Settings | None:
    """Return the settings that beat the present row at a point, None if none does; print how they fare."""
    judge, race = Judge(point.case, device), Race(point.case, device)
    grid = list(tuning.settings(point.case.sizes))
    first, failed = time_settings(tuning, point, grid, 3, judge, race)
    final, _ = time_settings(tuning, point, [None, *(s for _, s in first[:FINALISTS])], rounds, judge, race)
    present = next((seconds for seconds, chosen in final if chosen is None), float("inf"))
    seconds, chosen = final[0]
    print(
        f"{tuning.name} {point.case.name} {point.pass_name}: {len(first)} of {len(grid)} settings work {failed or ''}"
    )
    for time, settings in final:
        print(f"  {1e6 * time:10.1f} us  {'the present row' if settings is None else json.dumps(settings)}")
    return chosen if chosen is not None and seconds * GAIN < present else None


def with_rows(
    table: Mapping[str, list[Settings]], kernel: str, arch: str, found: Mapping[int | None, Settings]
) -> dict[str, list[Settings]]:
    """Return the table with rows of an architecture: those found, by `up_to`, and the others that it had.

    They stand before all rows of the kernel for other architectures, ascending, the one without `up_to` last: the first
    row that fits counts.
    """
    mine = {row.get("up_to"): row for row in table[kernel] if row.get("arch") == arch}
    for up_to, settings in found.items():
        limit = {} if up_to is None else {"up_to": up_to}
        mine[up_to] = {"arch": arch, **limit, **settings}
    ordered = sorted(mine.values(), key=lambda row: row.get("up_to", float("inf")))
    others = [row for row in table[kernel] if row.get("arch") != arch]
    return {**table, kernel: [*ordered, *others]}


def formatted(table: Mapping[str, list[Settings]]) -> str:
    """Return a table as JSON with one row a line."""
    kernels = [
        f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
        for kernel, rows in table.items()
    ]
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def write_rows(path: Path, kernel: str, arch: str, found: Mapping[int | None, Settings]) -> None:
    """Write the rows found for a kernel into a table's file."""
    table = json.loads(path.read_text("utf-8"))
    path.write_text(formatted(with_rows(table, kernel, arch, found)), "utf-8")


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="file/kernel, or a file for all of its kernels")
    parser.add_argument("--all", action="store_true", help="tune all kernels")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each finalist")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--list", action="store_true", help="print what can be tuned")
    parser.add_argument("--format", action="store_true", help="rewrite the tables in their stable form")
    return parser.parse_args()


def main() -> int:
    """Tune what was asked for."""
    options = read_options()
    if options.format:
        for path in sorted(TABLES.glob("*.json")):
            path.write_text(formatted(json.loads(path.read_text("utf-8"))), "utf-8")
        return 0
    if options.list:
        for tuning in TUNINGS:
            for point in tuning.points:
                count = len(list(tuning.settings(point.case.sizes)))
                print(f"{tuning.name:<28} {count:4} settings at {point.case.name} {point.pass_name}")
        return 0
    unknown = [name for name in options.kernels if not any(name in (t.name, t.file) for t in TUNINGS)]
    if unknown or not (options.all or options.kernels):
        print(f"{' '.join(unknown) or 'no kernel'}: not known here; --list says what is", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() or launch.INTERPRETED:
        print("tuning needs a GPU, and no TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # the check's fp32 is fp32
    device, arch = torch.device("cuda"), launch.architecture()
    for tuning in TUNINGS:
        if not options.all and tuning.name not in options.kernels and tuning.file not in options.kernels:
            continue
        found = {}
        for point in tuning.points:
            chosen = best_settings(tuning, point, device, options.rounds)
            release(device)
            if chosen is not None:
                found[point.up_to] = chosen
        print(f"{tuning.name}: {len(found)} rows for {arch}{' (not written)' if options.dry_run else ''}", flush=True)
        if found and not options.dry_run:
            write_rows(TABLES / f"{tuning.file}.json", tuning.kernel, arch, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
