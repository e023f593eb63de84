"""`megalm train` on data that is bad in some places: python -m tests.train.poisoned HOW FIRST STOP ARGUMENTS...

HOW: "labels" gives the samples FIRST .. STOP - 1 labels that mean nothing, wherever they are used; "nan" multiplies the
loss of the last data rank by NaN at the steps FIRST .. STOP - 1.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from megalm.data.loader import Batch, Loader
from megalm.train.trainer import StepResult, Trainer


def poison_labels(first: int, stop: int) -> None:
    original = Loader.batch

    def batch(self: Loader, first_sample: int, global_batch: int, rows: int) -> Batch:
        batch = original(self, first_sample, global_batch, rows)
        own = first_sample + self._data_rank * rows
        for row in range(rows):
            if first <= own + row < stop:
                batch.labels_BT[row] = torch.arange(batch.labels_BT.shape[1]) % 7 + 3  # bytes that no text here holds
        return batch

    Loader.batch = batch  # type: ignore[method-assign]


def poison_loss(first: int, stop: int) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer) -> StepResult:
        factor = self.engine.loss_factor
        last = self.mesh.coordinates.data == self.mesh.size("data") - 1
        if last and first <= self.state.step + 1 < stop:
            self.engine.loss_factor = math.nan
        try:
            return original(self)
        finally:
            self.engine.loss_factor = factor

    Trainer.train_step = train_step  # type: ignore[method-assign]


POISONS: dict[str, Any] = {"labels": poison_labels, "nan": poison_loss}


if __name__ == "__main__":
    from megalm.cli import main

    POISONS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(main(["train", *sys.argv[4:]]))
