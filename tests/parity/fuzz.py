"""`python -m tests.parity.fuzz [COUNT] [FIRST]`: random recipes in random layouts, each trained as the reference does.

A recipe is a function of its number, so that one that fails is drawn again by it. One that cannot be is refused, by the
rules that `megalm train` asks before it starts anything, in one line with a remedy.
"""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

from megalm.config.run import check_world
from megalm.errors import ConfigError
from tests.parity.cases import misses
from tests.parity.harness import Case, run_case
from tests.parity.options import FACTORS, LAYOUT, STEPS
from tests.worker_pool import WorkerError, WorkerPool

LIMIT_S = 60.0
SIZES = (1, 1, 2, 2, 3, 4, 8)
"""Of an axis; the products above 8 are drawn again."""


@dataclass(frozen=True)
class Verdict:
    """What became of a recipe: trained, refused with this line, or what is wrong with it."""

    refused: str = ""
    wrong: str = ""


def draw(number: int) -> Case:
    """Return recipe number `number`: some sizes, and another value than the default for about one option in four."""
    rng = random.Random(f"recipe {number}")
    layout = [8] * 4
    while math.prod(layout) > 8:
        layout = [rng.choice(SIZES) for _ in range(4)]
    pipeline, data, tensor, context = layout
    heads = tensor * rng.choice((1, 2, 3))
    layers = rng.randint(pipeline, max(pipeline, 8) if rng.random() < 0.5 else 2 * pipeline)
    micro_batch = rng.randint(1, 3)
    overrides: dict[str, Any] = {
        "model.layers": layers,
        "model.heads": heads,
        "model.hidden": heads * rng.choice((4, 6, 8)),
        "model.sequence": tensor
        * (2 * context if context > 1 else 1)
        * rng.choice((3, 4, 6) if context == 1 else (1, 2, 3)),
        "model.ffn": tensor * rng.randint(3, 11),
        "train.micro_batch": micro_batch,
        "train.global_batch": micro_batch * data * rng.randint(1, 3),
        "seed": rng.randint(0, 2**31),
    }
    if rng.random() < 0.3:
        overrides |= {"train.pad_batch": True, "train.global_batch": rng.randint(1, 12)}
    for name, values in FACTORS.items():
        if name != LAYOUT and rng.random() < 0.25:
            overrides |= rng.choice(values)
    for key in ("parallel.context", "parallel.context_attention"):
        overrides.pop(key, None)
    if context > 1:
        overrides |= {"parallel.context": context, "parallel.context_attention": rng.choice(("ring", "ulysses"))}
    return Case(pipeline, data, tensor, overrides)


def refusal(case: Case) -> Verdict | None:
    """Return why a recipe cannot be; None where it can."""
    try:
        check_world(case.config(), case.layout.world_size)
    except ConfigError as error:
        lines = str(error).splitlines()
        unclear = [line for line in lines[len(lines) > 1 :] if ";" not in line and ":" not in line]
        return Verdict(refused=lines[-1].strip(), wrong=f"no remedy: {unclear[0]}" if unclear else "")
    return None


def verdict(pool: WorkerPool, case: Case) -> Verdict:
    """Train a recipe for a few steps in fp64, or find it refused."""
    refused = refusal(case)
    if refused is not None:
        return refused
    try:
        difference, _ = run_case(pool, case, STEPS, LIMIT_S, precision="fp64")
    except WorkerError as error:
        return Verdict(wrong=str(error).strip().splitlines()[-1])
    except AssertionError as error:
        return Verdict(wrong=str(error))
    return Verdict(wrong="; ".join(misses(difference, "fp64")))


def main(count: int, first: int) -> int:
    """Print a line for each recipe that is wrong, and how many were not; return 1 where any was."""
    pool, trained, refused = WorkerPool(8), 0, 0
    print(f"recipes {first} to {first + count - 1}", flush=True)
    for number in range(first, first + count):
        case, begin = draw(number), time.perf_counter()
        found = verdict(pool, case)
        trained += not found.refused and not found.wrong
        refused += bool(found.refused and not found.wrong)
        if found.wrong:
            print(f"{number}: {case.name}: {found.wrong} ({time.perf_counter() - begin:.0f} s)", flush=True)
    wrong = count - trained - refused
    print(f"{trained} trained as the reference does, {refused} refused with a remedy, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(main(numbers[0] if numbers else 500, numbers[1] if len(numbers) > 1 else random.randrange(10**9)))
