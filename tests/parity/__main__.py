"""`python -m tests.parity [--write FILE] [WORDS]`: all cases, or those whose names hold WORDS, as a table.

The layouts run in two precisions under two optimizers, the covering array of options in fp64. FILE is written at the
end, as Markdown with a row a recipe.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.parity import options
from tests.parity.cases import CASES, GRADIENT_LIMITS, LOSS_LIMIT, NORM_LIMIT, OPTIMIZERS, STEPS, misses
from tests.parity.harness import Case, Difference, run_case
from tests.worker_pool import WorkerError, WorkerPool

_LONGEST = 48
Found = dict[str, list[tuple[str, Difference | None]]]
"""The differences of each recipe by its name, each with its precision; None: the run failed."""


def runs() -> Iterator[tuple[Case, int, str, str, dict[str, Any]]]:
    """Yield case, steps, precision, optimizer's name and its overrides."""
    for case in CASES:
        for precision in ("fp64", "fp32"):
            for optimizer, overrides in OPTIMIZERS.items():
                yield case, STEPS, precision, optimizer, overrides
    for case in options.covering_array():
        yield case, options.STEPS, "fp64", "adamw", {}


def main(arguments: list[str]) -> int:
    """Print a row a run and return the exit status: 1 where any layout differs from the reference."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args(arguments)
    chosen = [run for run in runs() if all(word in run[0].name for word in given.words)]
    if not chosen:
        parser.error(f"no case has {' and '.join(given.words)} in its name")
    width = max(min(len(case.name), _LONGEST) for case, *_ in chosen)
    print(f"{'layout':<{width}}  precision  optimizer  gradient    loss    norm  seconds")
    pool, found, failures = WorkerPool(8), Found(), 0
    for case, steps, precision, optimizer, overrides in chosen:
        begin = time.perf_counter()
        head = f"{case.name:<{width}}  {precision:<9}  {optimizer:<9}"
        difference = None
        try:
            difference, _ = run_case(pool, case, steps, precision=precision, **overrides)
        except WorkerError as error:
            print(f"{head}  FAILED\n{error}", flush=True)
        else:
            print(
                f"{head}  {difference.gradient:8.1e}  {difference.loss:6.0e}  {difference.norm:6.0e}  "
                f"{time.perf_counter() - begin:7.1f}  {'; '.join(misses(difference, precision))}",
                flush=True,
            )
        failures += difference is None or bool(misses(difference, precision))
        found.setdefault(case.name, []).append((precision, difference))
    total = f"{len(found)} recipes, {len(chosen)} runs, {failures} differ from the one-process reference"
    print(total)
    if given.write is not None:
        given.write.write_text(markdown(found, total))
    return 1 if failures else 0


def markdown(found: Found, total: str) -> str:
    """Return the page of a run: the largest differences of each recipe over its runs in a precision."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    lines = [
        "# Every layout against one process\n",
        f"Written by `make parity ARGS='--write docs/parity.md'` on {datetime.date.today()}, Python "
        f"{platform.python_version()}, {versions}, gloo, at most 8 processes: **{total}**.\n",
        "A row is a recipe in a layout: t tensor, p pipeline, c context, d data ranks, and what differs from the "
        "gate's small GPT. Differences are relative, the largest over ranks, steps and runs: of the step-1 gradient "
        f"of any parameter (at most {GRADIENT_LIMITS['fp64']:.0e} in fp64 and {GRADIENT_LIMITS['fp32']:.0e} in fp32), "
        f"of the losses ({LOSS_LIMIT:.0e}) and of the gradient norms ({NORM_LIMIT:.0e}, which DeepSpeed takes in "
        f"fp32). The first {len(CASES)} train {STEPS} steps in both precisions under AdamW and SGD, the others, a "
        f"covering array of all options, {options.STEPS} steps in fp64.\n",
        "| layout | gradient, fp64 | gradient, fp32 | loss, fp64 | loss, fp32 | norm, fp32 |",
        "|---|---|---|---|---|---|",
    ]
    columns = (("gradient", "fp64"), ("gradient", "fp32"), ("loss", "fp64"), ("loss", "fp32"), ("norm", "fp32"))
    for name, differences in found.items():
        cells = [_largest(differences, what, precision) for what, precision in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _largest(differences: list[tuple[str, Difference | None]], what: str, precision: str) -> str:
    own = [difference for kind, difference in differences if kind == precision]
    if any(difference is None for difference in own):
        return "failed"
    return f"{max(getattr(difference, what) for difference in own):.0e}" if own else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
