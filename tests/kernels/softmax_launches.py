"""What the compile check launches of `kernels/softmax.py`: every row of the table, causal or not, masked or not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.softmax import scaled_masked_softmax


def _call(dtype: torch.dtype, keys: int, causal: bool, with_mask: bool) -> Callable[[], None]:
    def run() -> None:
        x = torch.empty(2, 4, 32, keys, dtype=dtype, requires_grad=True)
        mask = torch.empty(2, 1, 1, keys, dtype=torch.bool) if with_mask else None
        scaled_masked_softmax(x, scale=0.125, mask=mask, causal=causal).sum().backward()

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    **{
        f"{dtype}, {keys}, {'causal' if causal else 'full'}{', masked' if masked else ''}": _call(
            dtype, keys, causal, masked
        )
        for dtype in (torch.bfloat16, torch.float32)
        for keys in (64, 512, 1024, 2048, 4096, 8192, 16384, 65536)
        for causal in (True, False)
        for masked in (True, False)
    },
    "float16, 2048, causal": _call(torch.float16, 2048, True, False),
    "bfloat16, 2047 odd, causal": _call(torch.bfloat16, 2047, True, True),
}
