"""torch.compile of a model's blocks, each as one program; blocks that are alike share it, so it is made once.

What differs from step to step reaches a block as tensors (`DropoutKeys.words`), so nothing is compiled anew after the
first step; only evaluation, whose passes keep nothing for gradients, has a program of its own, and each length of
growing sequences. A program is for one shape: sizes are constants in it.
"""

from __future__ import annotations

import time
from typing import Any, Self

import torch
from torch._dynamo.callback import callback_handler

from megalm.errors import ConfigError
from megalm.models.transformer import Transformer
from megalm.train.monitor import Throughput
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, Trainer

PROGRAMS = 64
"""That a block may have: windows, lengths, recomputation, evaluation. More are a mistake, which torch then reports."""


def compile_blocks(model: Transformer) -> None:
    """Have each block compiled when it first runs; a part of it that cannot be is an error then, not run by itself.

    Raises ConfigError where there is no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second's import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "train.compile=true needs a C++ compiler and finds none; install g++, set CXX to one, or use "
            "train.compile=false"
        ) from error
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


class TellOfCompilation:
    """Says after a step for how long this process compiled since the last one, whatever it was; to be entered.

    That time is left out of the rate. Blocks are compiled where the recipe asks for it, and a few optimizers' updates.
    """

    def __init__(self, tracker: Tracker, meter: Throughput) -> None:
        self.tracker = tracker
        self.meter = meter
        self._began = 0.0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)

    def _begin(self, _: Any) -> None:
        self._began = time.perf_counter()
        self.meter.pause()

    def _end(self, _: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        self.meter.go_on()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Report what was compiled within the step, or in an evaluation before it."""
        if self._seconds:
            self.tracker.event({"step": trainer.state.step, "event": "compiled", "seconds": round(self._seconds, 1)})
            self._seconds = 0.0

    def at_end(self, trainer: Trainer) -> None:
        """Nothing is left to be told: what is compiled now is the last evaluation's."""
