"""How fast are checkpoints saved and loaded, beside the disk itself and torch's distributed checkpoint?

    python benchmarks/checkpoint.py                             # below the system's directory for temporary files
    python benchmarks/checkpoint.py --root /scratch --megabytes 16384 --ranks 1 8

The ranks hold matrices of layers with two states each, split by rows, in fp32. In turn, in the same processes, they

- write the same bytes plainly, a file each, and sync it: the disk's own rate; save a checkpoint; let torch's
  distributed checkpoint (DCP) save, its files synced as well, which has no checksums;
- copy everything in memory, the stall of an asynchronous save;
- read plainly, load the checkpoint with and without its checksums, let DCP load; and load as ranks that split matrices
  by columns, both of them. Before each read the system is told to forget the files.

A rate is all bytes by the time until the last rank is through; ratios are of the runs of one repetition, their median
with the quartiles beside it, above 1 where megalm is faster. What is loaded is compared with what was saved. CPU is the
processor's seconds of all ranks for a GB.

Writes NAME.json and prints a table, where --out is the name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from workers import machine, measured_by, write_result

PROCESS = Path(__file__).with_name("checkpoint_process.py")
ROWS = {
    "save": ("save", "plain_write", "dcp_save"),
    "stall": ("snapshot", None, None),
    "load": ("load", "plain_read", "dcp_load"),
    "load, unverified": ("load_unverified", "plain_read", "dcp_load"),
    "load into columns": ("reshard", "plain_read", "dcp_reshard"),
}
"""What is measured, beside the disk's and DCP's."""
GIVEN = ("megabytes", "hidden", "repetitions", "dcp_threads")


def measure(ranks: int, job: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return what `ranks` processes measured, with their files below `root`."""
    raw = measured_by(PROCESS, job, ranks, root)
    return {"bytes": raw["bytes"], "rows": rows(raw), "seconds": raw["seconds"]}


def rows(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of each row: rates in GB/s, ratios, CPU seconds a GB."""
    found: dict[str, dict[str, Any]] = {}
    gigabytes, seconds = raw["bytes"] / 1e9, raw["seconds"]
    for name, jobs in ROWS.items():
        own = seconds[jobs[0]]
        row: dict[str, Any] = {"cpu_s_per_gb": median(cpu for _, cpu in own) / gigabytes}
        for label, job in zip(("megalm", "disk", "dcp"), jobs, strict=True):
            if job is None:
                continue
            row[f"{label}_gb_s"] = gigabytes / median(wall for wall, _ in seconds[job])
            if label != "megalm":
                row[f"of_{label}"] = spread(
                    [theirs / ours for (ours, _), (theirs, _) in zip(own, seconds[job], strict=True)]
                )
        found[name] = row
    extra = zip(seconds["load"], seconds["load_unverified"], strict=True)
    found["load"]["verification"] = spread([verified / plain - 1.0 for (verified, _), (plain, _) in extra])
    return found


def spread(ratios: list[float]) -> list[float]:
    """Return the median and the quartiles."""
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    return [median(ratios), low, high]


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| | ranks | megalm | disk | DCP | of the disk's rate | of DCP's | CPU s/GB |", "|" + "---|" * 8]
    for ranks, one in measured.items():
        for name, row in one["rows"].items():
            cells = [
                f"{row[f'{who}_gb_s']:.2f} GB/s" if f"{who}_gb_s" in row else "" for who in ("megalm", "disk", "dcp")
            ]
            for who in ("of_disk", "of_dcp"):
                cells.append("{:.2f} ({:.2f} to {:.2f})".format(*row[who]) if who in row else "")
            lines.append(f"| {name} | {ranks} | {' | '.join(cells)} | {row['cpu_s_per_gb']:.2f} |")
    for ranks, one in measured.items():
        figures = "{:+.1%} ({:+.1%} to {:+.1%})".format(*one["rows"]["load"]["verification"])
        lines += ["", f"Checksums, {ranks} ranks: {figures} of a load's time."]
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="on the disk")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--megabytes", type=int, default=768, metavar="N", help="of all ranks together")
    parser.add_argument("--hidden", type=int, default=1024, metavar="N", help="of the matrices: 12 N**2 a layer")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument(
        "--dcp-threads", type=int, default=2, metavar="N", help="files, and threads, of a rank of DCP's"
    )
    name = Path(__file__).parent / "results" / "checkpoint"
    parser.add_argument("--out", type=Path, default=name, metavar="NAME")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write."""
    options = read_options()
    before = machine()
    job = {key: getattr(options, key) for key in GIVEN}
    measured = {str(ranks): measure(ranks, job, options.root) for ranks in options.ranks}
    print(table(measured))
    write_result(options.out.with_suffix(".json"), before, {**job, "measured": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
