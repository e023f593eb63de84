"""Put on PYTHONPATH of a job, this plants faults in it; what its steps compute stays the same.

MEGALM_TEST_STEP_S: seconds that each step lasts longer. MEGALM_TEST_FAIL: the rank that raises in its first step.
MEGALM_TEST_FAULT: "FAULT RANK STEP", one of tests/watchdog/faulty.py, in the job's first start. MEGALM_TEST_OLD_NUMPY:
the node whose numpy seems to be 1.0.1. MEGALM_TEST_ABSENT: the node on which no rank gets to its program.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import tempfile
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "megalm.train.trainer"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None, name
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            _change(module.Trainer)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _change(trainer: type) -> None:
    train_step = trainer.train_step  # type: ignore[attr-defined]

    def changed(*arguments: object, **options: object) -> object:
        if os.environ.get("MEGALM_TEST_FAIL") == os.environ.get("SLURM_PROCID", ""):
            raise RuntimeError("planted: this rank cannot compute")
        time.sleep(float(os.environ.get("MEGALM_TEST_STEP_S", "0")))
        _plant(arguments[0])
        return train_step(*arguments, **options)

    trainer.train_step = changed  # type: ignore[attr-defined]


def _plant(trainer: Any) -> None:
    """Plant the fault of this step, if one is asked of this rank."""
    fault, rank, step = os.environ.get("MEGALM_TEST_FAULT", "none -1 0").split()
    here = rank == os.environ.get("SLURM_PROCID") and trainer.state.step + 1 == int(step)
    if here and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        from tests.watchdog.faulty import FAULTS, meet_at_the_data, skip_a_collective

        print(f"planted at {time.time():.1f}", file=sys.stderr, flush=True)
        skip_a_collective(trainer) if fault == "skip" else meet_at_the_data(trainer, FAULTS[fault])


def _spoil_node() -> None:
    """Do what is asked of this node, in the ranks of a job only."""
    node = os.environ.get("SLURMD_NODENAME")
    if node is None or "SLURM_STEP_ID" not in os.environ:
        return
    if node == os.environ.get("MEGALM_TEST_ABSENT"):
        time.sleep(3600)
    if node == os.environ.get("MEGALM_TEST_OLD_NUMPY"):
        folder = Path(tempfile.mkdtemp(prefix="old-numpy-")) / "numpy-1.0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0.1\n")
        sys.path.insert(0, str(folder.parent))


_spoil_node()
sys.meta_path.insert(0, _Finder())
