"""What the compile check launches of `kernels/cross_entropy.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.cross_entropy import cross_entropy

_VOCABULARIES = {"even": 128256, "odd": 50257, "one block": 1000}


def _call(dtype: torch.dtype, vocab: int) -> Callable[[], None]:
    def run() -> None:
        logits = torch.empty(4, vocab, dtype=dtype, requires_grad=True)
        targets = torch.empty(4, dtype=torch.int64)
        cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-4).sum().backward()

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"cross_entropy {dtype}, {name}": _call(dtype, vocab)
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for name, vocab in _VOCABULARIES.items()
}
