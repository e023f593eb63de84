"""`python -m tests.parity.fuzz [COUNT] [FIRST]`: random recipes in random layouts, each trained as the reference does.

A recipe is a function of its number, so that one that fails is drawn again by it. One that cannot be is refused, by the
rules that `megalm train` asks before it starts anything, in one line with a remedy.
"""

from __future__ import annotations

import functools
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import ConfigError
from megalm.launch.checks import check_world
from megalm.train.parameter_rules import check_rules
from tests.parity.cases import misses
from tests.parity.harness import VOCAB, Case, run_case
from tests.parity.options import FACTORS, LAYOUT, STEPS, Value
from tests.worker_pool import WorkerError, WorkerPool

LIMIT_S = 60.0
SIZES = (1, 1, 2, 2, 3, 4, 8)
"""Of an axis; the products above 8 are drawn again."""
FLAGS = ("allgather_partitions", "contiguous_gradients", "ignore_unused_parameters", "memory_efficient_linear",
         "reduce_scatter", "round_robin_gradients", "stage3_allgather_sequential",
         "stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce")  # fmt: skip
COUNTS = ("allgather_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
          "stage3_prefetch_bucket_size", "sub_group_size")  # fmt: skip
"""Of a DeepSpeed JSON, what is drawn."""


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
    overrides: Value = {
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
        kind = rng.choice(("ring", "ulysses" if heads // tensor % context == 0 else "ring"))
        overrides |= {"parallel.context": context, "parallel.context_attention": kind}
    return Case(pipeline, data, tensor, overrides | _further(rng, overrides, pipeline, data * context))


def _further(rng: random.Random, chosen: Value, pipeline: int, replicas: int) -> Value:
    """Return what is drawn beside the covering array's values: experts over any ranks, what is frozen, a JSON."""
    more: Value = {}
    if "model.experts" in chosen:
        ranks = rng.choice([n for n in range(1, 9) if replicas % n == 0])
        more |= {"parallel.expert": ranks, "model.experts": ranks * max(2, 4 // ranks)}
        more["model.expert_ffn"] = chosen["model.ffn"]
        more["model.ffn"] = chosen["model.ffn"] if "model.dense_layers" in chosen else None
    if rng.random() < 0.2:
        layers = range(chosen["model.layers"])
        kept = rng.choice(layers)
        but_one = ["[!b]*", *(f"blocks.{layer}.*" for layer in layers if layer != kept)]
        kinds = [["*norm*"], ["*.bias"], ["*.experts.*" if "model.experts" in chosen else "*.mlp.*"], but_one]
        more["optim.rules"] = [{"match": match, "freeze": True} for match in rng.choice(kinds)]
    if rng.random() < 0.15:
        more["optim.ema_decay"] = 0.9
    if rng.random() < 0.25:
        more["zero.stage"] = rng.choice((1, 2, 3) if pipeline == 1 else (1, 2))
        more["zero.config"] = _deepspeed_json(rng)
    return more


def _deepspeed_json(rng: random.Random) -> str:
    """Return the path of a DeepSpeed JSON of some flags and sizes, for any stage; small weights are divided too."""
    zero: Value = {key: rng.random() < 0.5 for key in FLAGS if rng.random() < 0.3}
    zero |= {key: rng.choice((100, 3000)) for key in COUNTS if rng.random() < 0.3}
    zero |= {"stage": "auto", "stage3_param_persistence_threshold": rng.choice((1, 50))}
    if rng.random() < 0.2:
        zero["offload_optimizer"] = {"device": "cpu"}
    text = json.dumps({"zero_optimization": zero})
    path = Path(_folder().name) / f"{random.Random(text).getrandbits(32):08x}.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return where this process's JSONs are, until it ends."""
    return tempfile.TemporaryDirectory(prefix="fuzz-")


def refusal(case: Case) -> Verdict | None:
    """Return why a recipe cannot be; None where it can."""
    try:
        config = case.config()
        check_world(config, case.layout.world_size)
        check_rules(config, VOCAB)
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
