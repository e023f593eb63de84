"""All ordered pairs of layouts: a checkpoint of the one, loaded and saved by the other, and ten steps from there.

    python -m tests.checkpoint.reshard_pairs --seed 7

trains a model of experts in each layout for some steps and saves; then goes on, unbroken. Every other layout loads that
checkpoint and saves it again: each tensor must be the same to the bit. Then it trains on: each loss must be that of the
unbroken run, within 1e-6 relative, and in the same layout to the bit. Prints the worst difference of each pair, as a
matrix, and ends with 1, and the pair, where one is not kept.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.checkpoint.manager import CheckpointManager, latest_checkpoint
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.train.continuing import load_all, progress_of
from megalm.train.trainer import Trainer
from tests.checkpoint.subject import read_whole, same
from tests.parity.cases import RING, SEQUENCE, ULYSSES, batch, expert, schedule, zero
from tests.parity.harness import Case, build_trainer
from tests.parity.options import EXPERTS
from tests.worker_pool import WorkerPool

BEFORE, AFTER = 3, 10
LIMIT = 1e-6
FACTS = {"data_fingerprint": "data", "tokenizer_fingerprint": "tokenizer"}
MODEL: dict[str, Any] = {
    **EXPERTS,
    "model.router_score": "sigmoid",
    "model.router_bias_rate": 0.01,
    "model.shared_experts": 1,
    "model.dense_layers": 1,
    "model.dropout": 0.1,
    "optim.ema_decay": 0.9,
    "optim.lr": 3e-4,
}
"""With every kind of state that a run may have: moments, an average, biases of routers."""

LAYOUTS = {
    "one": Case(1, 1, 1),
    "t2": Case(1, 1, 2, SEQUENCE),
    "t4": Case(1, 1, 4),
    "d2z1": Case(1, 2, 1, zero(1)),
    "d4e4z2": Case(1, 4, 1, {**zero(2), **expert(4), **batch(8, 1)}),
    "t2d2z3": Case(1, 2, 2, zero(3)),
    "p2": Case(2, 1, 1, {"parallel.schedule": "gpipe"}),
    "p4 zb-h1": Case(4, 1, 1, schedule("zb-h1")),
    "p2d2e2z1 interleaved": Case(2, 2, 1, {**zero(1), **expert(2), **schedule("interleaved", 2)}),
    "t2p2 zb-v": Case(2, 1, 2, {**SEQUENCE, **schedule("zb-v")}),
    "t2c2e2 ring": Case(1, 1, 2, {**RING, **SEQUENCE, **expert(2)}),
    "c2d2z3 ulysses": Case(1, 2, 1, {**ULYSSES, **zero(3)}),
    "t2p2d2e2z2 dualpipe-v": Case(2, 2, 2, {**SEQUENCE, **zero(2), **expert(2), **schedule("dualpipe-v")}),
    "t2p2c2e2z1 breadth-first": Case(2, 1, 2, {**RING, **zero(1), **expert(2), **schedule("breadth-first", 2)}),
}


def recipe(name: str) -> RunConfig:
    """Return the recipe of a layout."""
    case = LAYOUTS[name]
    return Case(case.pipeline, case.data, case.tensor, {**MODEL, **case.overrides}).config(precision="fp32")


def _save(trainer: Trainer, run: Path) -> None:
    progress = {key: list(value) if isinstance(value, list) else value for key, value in vars(trainer.state).items()}
    manager = CheckpointManager(run, 1, dist.group.WORLD)
    manager.save(trainer.state.step, trainer.engine.state(), {**FACTS, "progress": progress})


def train_and_save(mesh: ParallelMesh, config: RunConfig, run: str, after: int) -> list[float]:
    """Train, save after step `BEFORE`, and return the losses of the `after` steps that follow."""
    trainer = build_trainer(mesh, config)
    for _ in range(BEFORE):
        trainer.train_step()
    _save(trainer, Path(run))
    return [trainer.train_step().loss for _ in range(after)]


@dataclass(frozen=True)
class Visit:
    """What a layout made of another one's checkpoint: tensors compared, those that differ, the losses that followed."""

    tensors: int
    differ: list[str]
    losses: list[float]


def go_on(mesh: ParallelMesh, config: RunConfig, runs: dict[str, str], after: int) -> dict[str, Visit]:
    """Load each run's checkpoint in this layout, save it again, compare, and train on."""
    trainer = build_trainer(mesh, config)
    visits = {}
    for name, run in runs.items():
        reader = latest_checkpoint(Path(run), partial(load_all, trainer.engine), dist.group.WORLD)
        assert reader is not None, run
        trainer.state = progress_of(reader)
        again = Path(f"{run}-again")
        with closing(reader):
            _save(trainer, again)
            tensors, differ = compare(reader, again) if mesh.rank == 0 else (0, [])
        dist.barrier()
        if mesh.rank == 0:
            shutil.rmtree(again)
        visits[name] = Visit(tensors, differ, [trainer.train_step().loss for _ in range(after)])
    return visits


def compare(one: CheckpointReader, run: Path) -> tuple[int, list[str]]:
    """Return the number of tensors of both checkpoints, and those that are not the same to the bit."""
    other = latest_checkpoint(run)
    assert other is not None
    with closing(other):
        names = sorted({*one.manifest.tensors, *other.manifest.tensors})
        differ = [
            f"{name} ({kind})"
            for kind, name in names
            if not {(kind, name)} <= one.manifest.tensors.keys() & other.manifest.tensors.keys()
            or not same(read_whole(one, kind, name), read_whole(other, kind, name))
        ]
        if one.state != other.state:
            differ.append(f"state {one.state} and {other.state}")
    return len(names), differ


@dataclass
class Result:
    """The worst relative difference of a loss by pair (from, to), tensors compared, and what went wrong."""

    worst: dict[tuple[str, str], float]
    tensors: int
    wrong: list[str]


def run(pool: WorkerPool, directory: Path, names: list[str], pairs: set[tuple[str, str]], after: int) -> Result:
    """Do the pairs (from, to) of the named layouts."""
    result = Result({}, 0, [])
    unbroken, runs = {}, {}
    for number, name in enumerate(names):
        runs[name] = str(directory / f"run-{number}")
        reports = pool.run(train_and_save, recipe(name), runs[name], after, layout=LAYOUTS[name].layout, timeout_s=900)
        unbroken[name] = reports[0]
    for here in names:
        sources = {name: path for name, path in runs.items() if (name, here) in pairs}
        if not sources:
            continue
        ranks = pool.run(go_on, recipe(here), sources, after, layout=LAYOUTS[here].layout, timeout_s=3000)
        for name, visit in ranks[0].items():
            result.tensors += visit.tensors
            apart = [abs(a - b) / abs(b) for a, b in zip(visit.losses, unbroken[name], strict=True)]
            worst = max(apart) if all(map(math.isfinite, apart)) else math.inf
            result.worst[name, here] = worst
            pair = f"{name} -> {here}"
            result.wrong += [f"{pair}: {difference}" for difference in visit.differ]
            if not worst <= (0.0 if name == here else LIMIT):
                result.wrong.append(f"{pair}: loss off by {worst:.1e}")
        print(f"{here}: {len(sources)} checkpoints", flush=True)
    return result


def matrix(result: Result, names: list[str]) -> str:
    """Return the worst difference of each pair: a line a source, a column a target."""
    width = max(map(len, names))
    lines = [" " * (width + 4) + "  ".join(f"{number:>7}" for number in range(1, len(names) + 1))]
    for number, name in enumerate(names, start=1):
        cells = [f"{result.worst[name, here]:7.0e}" if (name, here) in result.worst else " " * 7 for here in names]
        lines.append(f"{number:2}  {name:<{width}}" + "  ".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Do all pairs, or some, and print the matrix; 0 if all were kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint.reshard_pairs")
    parser.add_argument("--pairs", type=int, help="so many of them, by chance (default: all)")
    parser.add_argument("--seed", type=int, default=7)
    parsed = parser.parse_args(arguments)
    names, begin = list(LAYOUTS), time.monotonic()
    every = [(one, other) for one in names for other in names]
    chosen = set(every if parsed.pairs is None else random.Random(parsed.seed).sample(every, parsed.pairs))
    pool = WorkerPool(8)
    with tempfile.TemporaryDirectory(prefix="reshard-") as directory:
        result = run(pool, Path(directory), names, chosen, AFTER)
    pool.close()
    print("worst relative difference of a loss: from (line) to (column)", matrix(result, names), sep="\n")
    apart = [pair for pair in result.worst if pair[0] != pair[1]]
    print(f"{len(apart)} ordered pairs and {len(result.worst) - len(apart)} layouts with themselves, ", end="")
    print(f"{result.tensors} tensors compared bit for bit, {len(result.wrong)} differences; ", end="")
    print(f"{time.monotonic() - begin:.0f} s")
    print(*result.wrong[:20], sep="\n", end="\n" * bool(result.wrong))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
