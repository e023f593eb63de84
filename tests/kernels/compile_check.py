"""Compile every kernel for GPUs that are not there, and refuse what would be slow or would not start on them.

    python -m tests.kernels.compile_check [--archs sm_80,sm_90,...] [--triton DIR] [--short] [NAMES...]

Runs the LAUNCHES of tests/kernels/*_launches.py through the real public functions, with a driver that knows only the
target's name and a launcher that only takes down what it would have compiled; then compiles each distinct kernel.
A row fails on a register spill, on more shared memory than the target has, on a 16-bit matrix product on sm_90 without
wgmma, and where the compiler fails. A jitted function of kernels/ that nothing launches fails too, unless a launched
one calls it. NAMES choose launches whose "file: name" holds one of them; the name of a file checks the whole file.

--short compiles each kernel once, for sm_90: its first launch with bf16 arguments (or its first, if none has any).
--triton DIR compiles with another version, one of `pip install --target DIR --no-deps triton==VERSION`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.kernels.compile_worker import DIED, HERE, ROOT, SHARED_LIMIT_KB, Row

PROCESSES = 2


def check(
    archs: list[str], *, folder: Path = HERE, triton: Path | None = None, short: bool = False, names: Sequence[str] = ()
) -> list[Row]:
    """Return the rows of all targets, each from a process of its own, two at a time; a line to stderr for each."""
    parts = PROCESSES if len(archs) == 1 else 1
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if triton is not None:
        rest = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(triton.resolve()), *([rest] if rest else [])])

    def run(arch: str, part: int) -> list[Row]:
        order = {"arch": arch, "folder": str(folder.resolve()), "names": list(names), "short": short}
        begin = time.monotonic()
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            text = json.dumps(order | {"part": [part, parts]})
            command = [sys.executable, "-m", "tests.kernels.compile_worker", text, file.name]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            rows = dict(json.loads(line) for line in Path(file.name).read_text("utf-8").splitlines())
        print(f"{arch}: {len(rows)} kernels in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        if done.returncode != 0 and not any(DIED in row["problems"] for row in rows.values()):
            raise RuntimeError(f"the process for {arch} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return [Row(**rows[number]) for number in sorted(rows)]

    with ThreadPoolExecutor(PROCESSES) as pool:
        jobs = [pool.submit(run, arch, part) for arch in archs for part in range(parts)]
        return [row for job in jobs for row in job.result()]


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table; of the constants those that tell the rows of one kernel from each other."""
    heads = ("kernel", "arch", "regs", "shared KB", "spills", "wgmma", "pointers; constants", "")
    cells = [heads]
    for row in rows:
        same = [other.constants for other in rows if other.kernel == row.kernel and other.arch == row.arch]
        telling = {
            key: value
            for key, value in row.constants.items()
            if key.startswith("num_") or any(other.get(key) != value for other in same)
        }
        figures = [
            "" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x)
            for x in (row.registers, row.shared_kb, row.spills, row.wgmma)
        ]
        constants = " ".join(f"{key}={value}" for key, value in telling.items())
        problems = "FAILS: " + "; ".join(row.problems) + f" ({row.launch})" if row.problems else ""
        cells.append((row.kernel, row.arch, *figures, f"{row.types}; {constants}", problems))
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads) - 2)]
    for line in cells:
        yield "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), *line[-2:]]).rstrip()


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--archs", help=f"default: {','.join(SHARED_LIMIT_KB)}, with --short sm_90")
    parser.add_argument("--triton", type=Path, metavar="DIR", help="another version of triton")
    parser.add_argument("--short", action="store_true", help="each kernel once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the *_launches.py lie")
    return parser.parse_args()


def main() -> int:
    """Check, print the table; 1 where a row fails."""
    options = read_options()
    archs = options.archs.split(",") if options.archs else ["sm_90"] if options.short else list(SHARED_LIMIT_KB)
    for arch in archs:
        if arch not in SHARED_LIMIT_KB:
            print(f"--archs {arch}: not known here; use some of {', '.join(SHARED_LIMIT_KB)}", file=sys.stderr)
            return 2
    rows = check(archs, folder=options.folder, triton=options.triton, short=options.short, names=options.names)
    print(*table(rows), sep="\n")
    failed = sum(bool(row.problems) for row in rows)
    versions = ", ".join(sorted({row.triton for row in rows}))
    print(f"\n{len(rows)} kernels compiled with triton {versions} for {', '.join(archs)}, {failed} fail")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
