"""What the compile check launches of `kernels/grad_norm.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.grad_norm import grad_norm


def _call(count: int, squared: bool) -> Callable[[], None]:
    def run() -> None:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        grad_norm([torch.empty(64, dtype=dtype) for dtype in dtypes for _ in range(count)], squared=squared)

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"grad_norm of {count} tensors a dtype{', squared' if squared else ''}": _call(count, squared)
    for count, squared in ((1, False), (300, True), (1500, False))
}
