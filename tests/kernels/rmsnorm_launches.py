"""What the compile check launches of `kernels/rmsnorm.py`: every row of the table, with and without a sum before."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.rmsnorm import rms_norm


def _call(dtype: torch.dtype, features: int, with_sum: bool, dropout: float) -> Callable[[], None]:
    def run() -> None:
        x, residual = (torch.empty(2, 64, features, dtype=dtype, requires_grad=True) for _ in range(2))
        weight, row_bias = (torch.empty(features, dtype=dtype, requires_grad=True) for _ in range(2))
        if not with_sum:
            rms_norm(x, weight, eps=1e-5).sum().backward()
            return
        normed, total = rms_norm(
            x,
            weight,
            eps=1e-5,
            residual=residual,
            row_bias=row_bias if dropout > 0.0 else None,
            dropout=dropout,
            seed=1,
            dropout_origin=(0, 0, 64 if features % 4 else 128),
        )
        (normed.sum() + total.square().sum()).backward()

    return run


SIZES = (64, 128, 1024, 4096, 8192, 16384, 65536)
SEVERAL = (256, 512, 2048)
"""Widths of which a tile holds several rows, besides those of SIZES."""

LAUNCHES: dict[str, Callable[[], None]] = {
    **{
        f"{dtype}, {size}, {name}": _call(dtype, size, with_sum, dropout)
        for dtype in (torch.bfloat16, torch.float32)
        for size in SIZES
        for name, with_sum, dropout in (("alone", False, 0.0), ("after a sum", True, 0.0), ("all", True, 0.1))
    },
    **{
        f"{dtype}, {size}, {name}": _call(dtype, size, with_sum, dropout)
        for dtype, name, with_sum, dropout in (
            (torch.bfloat16, "alone", False, 0.0),
            (torch.bfloat16, "after a sum", True, 0.0),
            (torch.float32, "all", True, 0.1),
        )
        for size in SEVERAL
    },
    "float16, 4096": _call(torch.float16, 4096, False, 0.0),
    "bfloat16, 999 odd": _call(torch.bfloat16, 999, False, 0.0),
}
