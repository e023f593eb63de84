"""What the compile check launches of `kernels/embedding.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.embedding import embedding


def _call(dtype: torch.dtype, features: int) -> Callable[[], None]:
    def run() -> None:
        weight = torch.empty(64, features, dtype=dtype, requires_grad=True)
        embedding(torch.zeros(2, 256, dtype=torch.int64), weight).sum().backward()

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"embedding {dtype}, {features} features": _call(dtype, features)
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for features in (256, 1024, 1023)
}
