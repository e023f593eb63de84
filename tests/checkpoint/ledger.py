"""Which samples a run is trained on, over many resumes that change its layout and its number of data ranks.

    python -m tests.checkpoint.ledger --resumes 50 --seed 1

Each start draws a layout, a microbatch and a number of steps, goes on from the newest checkpoint, saves, and then
trains on for some steps that are lost, as after a kill. What the executor is given is noted row by row and found again
in the token file. Over two epochs each window must have been trained on once an epoch, in the global order, and a
step that is done again must have the same samples. Ends with 1, and the step, where that is not so.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megalm.checkpoint.manager import CheckpointManager
from megalm.config.run import RunConfig
from megalm.data.loader import Loader
from megalm.data.sampler import GlobalOrder
from megalm.data.token_file import TokenFile, TokenFileWriter
from megalm.data.windows import StreamWindows
from megalm.distributed.mesh import ParallelMesh
from megalm.train.continuing import load_all, progress_of
from megalm.train.trainer import Trainer
from tests.checkpoint.reshard_pairs import _save
from tests.parity.cases import PAD, RING, schedule, zero
from tests.parity.harness import VOCAB, Case, build_trainer
from tests.worker_pool import WorkerPool

BATCH, SEQUENCE, SEED = 4, 8, 7
SMALL: dict[str, Any] = {
    "model.layers": 2,
    "model.hidden": 8,
    "model.heads": 2,
    "model.sequence": SEQUENCE,
    "train.global_batch": BATCH,
    "train.steps": 1000,
}
LAYOUTS = (
    Case(1, 1, 1),
    Case(1, 2, 1, zero(1)),
    Case(1, 3, 1, {**PAD, **zero(2)}),
    Case(1, 4, 1, zero(2)),
    Case(1, 2, 2, zero(3)),
    Case(2, 1, 1, schedule("zb-h1")),
    Case(2, 2, 1, zero(1)),
    Case(1, 1, 2, RING),
)
Steps = dict[int, list[list[int]]]
"""By step, the windows of each microbatch; those of rows that only fill a batch up are left out."""


def make_tokens(path: Path, windows: int) -> TokenFile:
    """Write a token file of so many windows, no two of which are alike."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, windows * SEQUENCE + 1)
    with TokenFileWriter(path, VOCAB, "00" * 32) as writer:
        writer.append(tokens)
    return TokenFile(path)


def numbers_of_windows(windows: StreamWindows, file: TokenFile) -> dict[bytes, int]:
    """Return each window's number by its tokens."""
    found = {file.window(*windows.span(number)).tobytes(): number for number in range(len(windows))}
    assert len(found) == len(windows), "two windows are alike"
    return found


def keep_ledger(trainer: Trainer, numbers: dict[bytes, int]) -> Steps:
    """Have the windows noted that the executor is given from now on."""
    ledger: Steps = {}
    run = trainer.executor.run

    def noted(microbatches: Any, *args: Any, **more: Any) -> Any:
        rows = [list(zip(part.tokens_BT, part.loss_mask_BT, strict=True)) for part in microbatches]
        ledger[trainer.state.step + 1] = [
            [numbers[tokens.numpy().tobytes()] for tokens, mask in part if mask.any()] for part in rows
        ]
        return run(microbatches, *args, **more)

    trainer.executor.run = noted  # type: ignore[method-assign]
    return ledger


@dataclass(frozen=True)
class Start:
    """What one rank noted: its place on the data axis, steps that were saved, and steps that were lost."""

    data_rank: int
    kept: Steps
    lost: Steps


def start(
    mesh: ParallelMesh,
    config: RunConfig,
    tokens: str,
    run: str,
    steps: int,
    lost: int,
    fault: Callable[[Trainer], None] | None = None,
) -> Start:
    """Go on from the newest checkpoint for `steps` steps, save, and do `lost` more."""
    file = TokenFile(tokens)
    windows = StreamWindows(file, SEQUENCE)
    trainer = build_trainer(mesh, config)
    order = GlobalOrder(len(windows), SEED)
    trainer.loader = Loader(file, windows, order, mesh.coordinates.data, mesh.size("data"))
    reader = CheckpointManager(Path(run), 1, dist.group.WORLD).latest(partial(load_all, trainer.engine))
    if reader is not None:
        trainer.state = progress_of(reader)
    if fault is not None:
        fault(trainer)
    ledger = keep_ledger(trainer, numbers_of_windows(windows, file))
    for _ in range(steps):
        trainer.train_step()
    _save(trainer, Path(run))
    kept = dict(ledger)
    ledger.clear()
    for _ in range(lost):
        trainer.train_step()
    return Start(mesh.coordinates.data, kept, ledger)


def rows_of(starts: list[Start], steps: list[Steps]) -> dict[int, list[int]]:
    """Return each step's windows in the order of the data ranks; ranks of one data rank must agree."""
    found: dict[int, dict[int, list[int]]] = {}
    for one, ledger in zip(starts, steps, strict=True):
        for step, parts in ledger.items():
            rows = [window for part in parts for window in part]
            assert found.setdefault(step, {}).setdefault(one.data_rank, rows) == rows, f"step {step}: ranks disagree"
    return {step: [window for rank in sorted(ranks) for window in ranks[rank]] for step, ranks in found.items()}


@dataclass
class Result:
    """Starts by layout, steps that were done again, windows and epochs that were gone through, what went wrong."""

    starts: dict[str, int]
    again: int
    epochs: float
    wrong: list[str]


def run(
    pool: WorkerPool,
    directory: Path,
    resumes: int,
    windows: int,
    seed: int,
    fault: Callable[[Trainer], None] | None = None,
) -> Result:
    """Train for two epochs over so many resumes; `fault` breaks each start, to see it found out."""
    choose, result = random.Random(seed), Result({}, 0, 0.0, [])
    tokens = directory / "train.tokens"
    make_tokens(tokens, windows)
    ledger: dict[int, list[int]] = {}
    seen: dict[int, list[int]] = {}
    wanted = -(-2 * windows // BATCH)
    for number in range(resumes + 1):
        case = choose.choice(LAYOUTS)
        micro = choose.choice([1, 2]) if case.data < 4 else 1
        config = Case(case.pipeline, case.data, case.tensor, {**SMALL, **case.overrides, "train.micro_batch": micro})
        left = wanted - len(ledger)
        steps = left if number == resumes else choose.randint(0, max(0, min(left, round(2 * wanted / resumes))))
        parts = (config.config(precision="fp32"), str(tokens), str(directory / "run"), steps, choose.randrange(3))
        starts = pool.run(start, *parts, fault, layout=case.layout, timeout_s=600)
        result.starts[case.name] = result.starts.get(case.name, 0) + 1
        for part in ([one.kept for one in starts], [one.lost for one in starts]):
            for step, rows in rows_of(starts, part).items():
                result.again += step in seen
                if seen.setdefault(step, rows) != rows:
                    result.wrong.append(f"start {number}, step {step}: {rows}, earlier {seen[step]}")
        ledger.update(rows_of(starts, [one.kept for one in starts]))
    result.epochs = sum(map(len, ledger.values())) / windows
    result.wrong += broken_promises(ledger, windows)
    return result


def broken_promises(ledger: dict[int, list[int]], windows: int) -> list[str]:
    """Return what is wrong with the windows of all steps, two epochs and perhaps a little more."""
    wrong = []
    if sorted(ledger) != list(range(1, len(ledger) + 1)):
        wrong.append(f"steps {sorted(ledger)}")
    order = [window for step in sorted(ledger) for window in ledger[step]]
    for epoch in range(2):
        found = order[epoch * windows : (epoch + 1) * windows]
        if sorted(found) != list(range(windows)):
            missing = sorted(set(range(windows)) - set(found))
            wrong.append(f"epoch {epoch + 1}: windows {missing} are missing, {len(found)} were used")
    if order != GlobalOrder(windows, SEED).indices(0, len(order)).tolist():
        wrong.append("not the global order")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Train, print what was done; 0 if no sample was repeated or skipped."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint.ledger")
    parser.add_argument("--resumes", type=int, default=50)
    parser.add_argument("--windows", type=int, default=139)
    parser.add_argument("--seed", type=int, default=1)
    parsed = parser.parse_args(arguments)
    begin, pool = time.monotonic(), WorkerPool(4)
    with tempfile.TemporaryDirectory(prefix="ledger-") as directory:
        result = run(pool, Path(directory), parsed.resumes, parsed.windows, parsed.seed)
    pool.close()
    print("\n".join(f"{count:3} starts in {name}" for name, count in sorted(result.starts.items())))
    print(f"{parsed.resumes} resumes, {parsed.windows} windows, {result.epochs:.2f} epochs, ", end="")
    print(f"{result.again} steps done again; {len(result.wrong)} broken promises (seed {parsed.seed}); ", end="")
    print(f"{time.monotonic() - begin:.0f} s")
    print(*result.wrong[:20], sep="\n", end="\n" * bool(result.wrong))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
