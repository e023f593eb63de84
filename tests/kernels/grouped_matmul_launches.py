"""What the compile check launches of `kernels/grouped_matmul.py`: both layouts of the weight, even and odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.grouped_matmul import grouped_matmul

SIZES = {
    "even": (4096, 512, 768),
    "sixteens": (4096, 528, 784),
    "odd": (4099, 511, 765),
    "few rows": (256, 512, 768),
}
"""Rows, features in, features out."""


def _call(dtype: torch.dtype, rows: int, inner: int, outer: int, experts: int) -> Callable[[], None]:
    def run() -> None:
        x = torch.empty(rows, inner, dtype=dtype, requires_grad=True)
        weight = torch.empty(experts, outer, inner, dtype=dtype, requires_grad=True)
        y = grouped_matmul(x, weight, torch.empty(experts, dtype=torch.int64))
        y.backward(torch.empty_like(y))

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"{str(dtype).removeprefix('torch.')}, {name}, {experts} experts": _call(dtype, *sizes, experts)
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for name, sizes in SIZES.items()
    for experts in ((8, 256) if name == "even" and dtype != torch.float16 else (8,))
}
