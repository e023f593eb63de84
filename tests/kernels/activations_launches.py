"""What the compile check launches of `kernels/activations.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalm.kernels import activations

BF16 = torch.bfloat16


def _call(function: Callable[..., Tensor], dtype: torch.dtype, *shapes: tuple[int, ...]) -> Callable[[], None]:
    def run() -> None:
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        y = function(*inputs)
        y.backward(torch.empty_like(y))

    return run


def _halves(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(*x.chunk(2, dim=-1))


LAUNCHES: dict[str, Callable[[], None]] = {
    **{
        f"{name} {dtype} F{features}": _call(function, dtype, (64, 2 * features))
        for name, function in (("swiglu packed", activations.swiglu_packed), ("geglu packed", activations.geglu_packed))
        for dtype, features in ((BF16, 14336), (torch.float32, 14336))
    },
    "swiglu packed, narrow": _call(activations.swiglu_packed, BF16, (64, 2 * 256)),
    "swiglu packed, odd": _call(activations.swiglu_packed, BF16, (64, 2 * 37)),
    "swiglu packed, fp16": _call(activations.swiglu_packed, torch.float16, (64, 2 * 14336)),
    "swiglu of halves": _call(_halves(activations.swiglu), BF16, (64, 2 * 14336)),
    "geglu of halves": _call(_halves(activations.geglu), BF16, (64, 2 * 14336)),
    **{
        f"bias gelu {dtype} F{features}": _call(activations.bias_gelu, dtype, (64, features), (features,))
        for dtype, features in ((BF16, 16384), (BF16, 256), (BF16, 37), (torch.float32, 16384), (torch.float16, 16384))
    },
    **{
        f"gelu {dtype}": _call(lambda x: activations.bias_gelu(x, None), dtype, (64, 16384))
        for dtype in (BF16, torch.float32)
    },
}
