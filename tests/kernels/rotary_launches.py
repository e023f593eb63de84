"""What the compile check launches of `kernels/rotary.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.rotary import apply_rotary


def _call(dtype: torch.dtype, heads: int, features: int, turned: int, rows: tuple[int, ...]) -> Callable[[], None]:
    def run() -> None:
        qkv = torch.empty(2, 64, heads + 8, features, dtype=dtype, requires_grad=True)
        cos, sin = torch.empty(2, *rows, 64, turned)
        y = apply_rotary(qkv[:, :, :heads], cos, sin)
        y.backward(torch.empty_like(y))

    return run


BF16 = torch.bfloat16
LAUNCHES: dict[str, Callable[[], None]] = {
    **{f"rotary {dtype} E128": _call(dtype, 32, 128, 128, ()) for dtype in (BF16, torch.float32, torch.float16)},
    **{
        f"rotary H{heads} E{size}": _call(BF16, heads, size, size, ()) for heads, size in ((1, 128), (40, 64), (8, 256))
    },
    "rotary rows of their own": _call(BF16, 32, 128, 128, (2,)),
    "rotary a quarter of a head": _call(BF16, 32, 256, 64, ()),
    "rotary odd sizes": _call(BF16, 3, 37, 10, ()),
}
