"""`megalm train` with a rank that wants more memory than there is: -m tests.train.hungry RANK STEP ARGUMENTS..."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from megalm.distributed.progress import progress
from megalm.models.transformer import Transformer


def starve(rank: int, step: int) -> None:
    """Have a rank's forward pass ask for 32 TiB at a step, for which torch raises what it raises for want of memory."""
    original = Transformer.forward

    def forward(self: Transformer, *args: Any, **options: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == rank and progress.step == step:
            torch.empty(2**45, dtype=torch.uint8)
        return original(self, *args, **options)

    Transformer.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    from megalm.cli import main

    starve(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(["train", *sys.argv[3:]]))
