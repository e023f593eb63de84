"""What the compile check launches of `kernels/dropout.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.dropout import dropout


def _call(dtype: torch.dtype, features: int, all_tokens: int, with_residual: bool) -> Callable[[], None]:
    def run() -> None:
        x = torch.empty(2, 64, features, dtype=dtype, requires_grad=True)
        residual = torch.empty_like(x) if with_residual else None
        dropout(x, dropout=0.1, seed=1, dropout_origin=(0, 0, all_tokens), residual=residual).sum().backward()

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"dropout {dtype} {'with' if residual else 'no'} residual, features {features}, {name}": _call(
        dtype, features, all_tokens, residual
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for features in (1024, 1023)
    for name, all_tokens in (("whole", 64), ("part", 128))
    for residual in (True, False)
}
