"""`python -m tests.parity [WORDS]`: all cases (or those whose names hold WORDS) in all precisions, as a table."""

from __future__ import annotations

import sys
import time

from tests.parity.cases import CASES, OPTIMIZERS, STEPS, misses
from tests.parity.harness import run_case
from tests.worker_pool import WorkerError, WorkerPool


def main(words: list[str]) -> int:
    """Print a row a run and return the exit status: 1 where any layout differs from the reference."""
    cases = [case for case in CASES if all(word in case.name for word in words)]
    width = max(len(case.name) for case in cases)
    print(f"{'layout':<{width}}  precision  optimizer  gradient    loss    norm  seconds")
    pool, failures = WorkerPool(8), 0
    for case in cases:
        for precision in ("fp64", "fp32"):
            for optimizer, overrides in OPTIMIZERS.items():
                begin = time.perf_counter()
                head = f"{case.name:<{width}}  {precision:<9}  {optimizer:<9}"
                try:
                    difference, _ = run_case(pool, case, STEPS, precision=precision, **overrides)
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
    runs = len(cases) * 2 * len(OPTIMIZERS)
    print(f"{len(cases)} layouts, {runs} runs of {STEPS} steps, {failures} differ from the one-process reference")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
