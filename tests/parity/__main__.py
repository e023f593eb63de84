"""`python -m tests.parity [WORDS]`: all cases, or those whose names hold WORDS, as a table.

The layouts run in two precisions under two optimizers, the covering array of options in fp64.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.parity import options
from tests.parity.cases import CASES, OPTIMIZERS, STEPS, misses
from tests.parity.harness import Case, run_case
from tests.worker_pool import WorkerError, WorkerPool

_LONGEST = 48


def runs() -> Iterator[tuple[Case, int, str, str, dict[str, Any]]]:
    """Yield case, steps, precision, optimizer's name and its overrides."""
    for case in CASES:
        for precision in ("fp64", "fp32"):
            for optimizer, overrides in OPTIMIZERS.items():
                yield case, STEPS, precision, optimizer, overrides
    for case in options.covering_array():
        yield case, options.STEPS, "fp64", "adamw", {}


def main(words: list[str]) -> int:
    """Print a row a run and return the exit status: 1 where any layout differs from the reference."""
    chosen = [run for run in runs() if all(word in run[0].name for word in words)]
    width = max(min(len(case.name), _LONGEST) for case, *_ in chosen)
    print(f"{'layout':<{width}}  precision  optimizer  gradient    loss    norm  seconds")
    pool, failures = WorkerPool(8), 0
    for case, steps, precision, optimizer, overrides in chosen:
        begin = time.perf_counter()
        head = f"{case.name:<{width}}  {precision:<9}  {optimizer:<9}"
        try:
            difference, _ = run_case(pool, case, steps, precision=precision, **overrides)
        except WorkerError as error:
            failures += 1
            print(f"{head}  FAILED\n{error}", flush=True)
            continue
        missed = misses(difference, precision)
        failures += bool(missed)
        print(
            f"{head}  {difference.gradient:8.1e}  {difference.loss:6.0e}  {difference.norm:6.0e}  "
            f"{time.perf_counter() - begin:7.1f}  {'; '.join(missed)}",
            flush=True,
        )
    layouts = len({case.name for case, *_ in chosen})
    print(f"{layouts} recipes, {len(chosen)} runs, {failures} differ from the one-process reference")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
