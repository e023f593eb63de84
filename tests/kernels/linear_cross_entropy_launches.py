"""What the compile check launches of `kernels/linear_cross_entropy.py`: cross-entropy's kernels, on blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.linear_cross_entropy import linear_cross_entropy


def _call(dtype: torch.dtype, vocab: int) -> Callable[[], None]:
    def run() -> None:
        hidden = torch.empty(4, 16, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, 16, dtype=dtype, requires_grad=True)
        linear_cross_entropy(hidden, weight, torch.empty(4, dtype=torch.int64)).sum().backward()

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"linear_cross_entropy {dtype}, {name}": _call(dtype, vocab)
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for name, vocab in {"even": 128256, "odd": 50257, "one block": 1000}.items()
}
