"""What the compile check launches of `kernels/layernorm.py`: every row of the table, all that changes a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalm.kernels.layernorm import layer_norm


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def _alone(dtype: torch.dtype, features: int, with_bias: bool = True) -> Callable[[], None]:
    def run() -> None:
        x, weight, bias = (_empty(*shape, dtype=dtype) for shape in ((2, 64, features), (features,), (features,)))
        layer_norm(x, weight, bias if with_bias else None, eps=1e-5).sum().backward()

    return run


def _after_sum(dtype: torch.dtype, features: int, dropout: float, with_row_bias: bool) -> Callable[[], None]:
    def run() -> None:
        x, residual = (_empty(2, 64, features, dtype=dtype) for _ in range(2))
        weight, bias, row_bias = (_empty(features, dtype=dtype) for _ in range(3))
        normed, total = layer_norm(
            x,
            weight,
            bias,
            eps=1e-5,
            residual=residual,
            row_bias=row_bias if with_row_bias else None,
            dropout=dropout,
            seed=1,
            dropout_origin=(0, 0, 64 if features % 4 else 128),
        )
        (normed.sum() + total.square().sum()).backward()

    return run


SIZES = (64, 1024, 4096, 5120, 8192, 16384, 65536)
SEVERAL = (256, 512, 2048)
"""Widths of which a tile holds several rows, besides those of SIZES."""

LAUNCHES: dict[str, Callable[[], None]] = {
    **{f"{dtype}, {size}": _alone(dtype, size) for dtype in (torch.bfloat16, torch.float32) for size in SIZES},
    **{f"bfloat16, {size}": _alone(torch.bfloat16, size) for size in SEVERAL},
    "float16, 4096": _alone(torch.float16, 4096),
    "bfloat16, 1000 odd": _alone(torch.bfloat16, 999),
    "bfloat16, 4096 no bias": _alone(torch.bfloat16, 4096, with_bias=False),
    **{
        f"{dtype}, {size} after a sum, dropout {dropout}, {'with' if row_bias else 'no'} row bias": _after_sum(
            dtype, size, dropout, row_bias
        )
        for dtype in (torch.bfloat16, torch.float32)
        for size in SIZES
        for dropout, row_bias in ((0.0, False), (0.1, True))
    },
    **{
        f"{dtype}, {size} after a sum, dropout 0.1, with row bias": _after_sum(dtype, size, 0.1, True)
        for dtype in (torch.bfloat16, torch.float32)
        for size in SEVERAL
    },
    "bfloat16, 4096 after a sum, row bias alone": _after_sum(torch.bfloat16, 4096, 0.0, True),
    "bfloat16, 999 after a sum, odd, dropout": _after_sum(torch.bfloat16, 999, 0.1, True),
}
