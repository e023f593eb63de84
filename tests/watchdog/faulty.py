"""`megalm train` with a fault planted in one rank: python -m tests.watchdog.faulty FAULT RANK STEP ARGUMENTS..."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megalm.data.loader import Batch
from megalm.train.trainer import StepResult, Trainer


def hold_the_lock() -> None:
    """Never give the interpreter to another thread."""
    ctypes.PyDLL(None).pause()
    while True:
        ctypes.PyDLL(None).pause()


def enter_control_group() -> None:
    """Live with what SLOW_GROUP, the directory of a control group, leaves of the processor."""
    (Path(os.environ["SLOW_GROUP"]) / "cgroup.procs").write_text(str(os.getpid()))


FAULTS = {
    "slow": enter_control_group,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "lock": hold_the_lock,
    "sleep": lambda: time.sleep(3600),
}


def skip_a_collective(trainer: Trainer) -> None:
    """Leave out the all-reduce of this step's gradient norm."""
    original, update = dist.all_reduce, trainer.engine.update

    def skip(tensor: object, *args: object, **options: object) -> None:
        dist.all_reduce = original

    def skipping_update(lr: float) -> float:
        trainer.engine.update, dist.all_reduce = update, skip
        return update(lr)

    trainer.engine.update = skipping_update


def meet_at_the_data(trainer: Trainer, fault: Callable[[], None]) -> None:
    """Have the fault happen where this step's batch is read."""
    original = trainer.loader.batch

    def batch(*args: int) -> Batch:
        trainer.loader.batch = original
        fault()
        return original(*args)

    trainer.loader.batch = batch


def main() -> int:
    """Plant the fault and train."""
    from megalm.cli import main as megalm

    fault, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    original = Trainer.train_step

    def train_step(self: Trainer) -> StepResult:
        if os.environ["RANK"] == rank and self.state.step + 1 == step:
            skip_a_collective(self) if fault == "skip" else meet_at_the_data(self, FAULTS[fault])
        return original(self)

    Trainer.train_step = train_step
    return megalm(["train", *sys.argv[4:]])


if __name__ == "__main__":
    sys.exit(main())
