"""Put on PYTHONPATH of a job, this makes its steps last longer, or fail; what they compute stays the same.

MEGALM_TEST_STEP_S: seconds that each step lasts longer. MEGALM_TEST_FAIL: the rank that raises in its first step.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

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
        return train_step(*arguments, **options)

    trainer.train_step = changed  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Finder())
