"""What the compile check launches of `kernels/attention.py`: every row of its table, plain and with everything on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megalm.kernels import launch
from megalm.kernels.attention import flash_attention

TOKENS = 512
VARIANTS: dict[str, Any] = {
    "causal": lambda: {"causal": True},
    "full": lambda: {"causal": False},
    "packed, window, dropout": lambda: {
        "causal": True,
        "window": 128,
        "cu_seqlens": torch.empty(9, dtype=torch.int32),
        "dropout": 0.1,
        "seed": 5,
    },
    "lengths, softcap, alibi, odd dropout, lse": lambda: {
        "causal": False,
        "window": 100,
        "softcap": 30.0,
        "alibi_slopes": torch.empty(8),
        "key_lengths": torch.empty(1, dtype=torch.int32),
        "dropout": 0.1,
        "seed": 2**63,
        "return_lse": True,
    },
}


def _call(dtype: torch.dtype, head_size: int, variant: str, groups: int = 2) -> Callable[[], None]:
    def run() -> None:
        options = VARIANTS[variant]()
        keys = TOKENS - 3 * ("odd" in variant)
        q = torch.empty(1, TOKENS, 8, head_size, dtype=dtype, requires_grad=True)
        k, v = (torch.empty(1, keys, groups, head_size, dtype=dtype, requires_grad=True) for _ in range(2))
        results = flash_attention(q, k, v, **options)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(results, [torch.empty_like(x) for x in results])

    return run


CASES = [
    *((torch.bfloat16, size, variant) for size in (32, 64, 128, 256) for variant in VARIANTS),
    *((torch.bfloat16, size, "causal") for size in (40, 80, 192)),
    *((torch.float32, size, variant) for size in (64, 128, 256) for variant in list(VARIANTS)[::3]),
    (torch.float16, 128, "causal"),
]


def _specialized(dtype: torch.dtype, head_size: int, causal: bool) -> Callable[[], None]:
    """The forward kernel that no row of the table asks for as long as it has not been measured."""

    def run() -> None:
        if launch.architecture() != "sm_90":
            return
        settings = launch.settings

        def asking(file: str, kernel: str, size: int = 0) -> dict[str, Any]:
            return settings(file, kernel, size) | ({"specialized": True} if kernel == "forward" else {})

        with mock.patch.object(launch, "settings", asking):
            flash_attention(*(torch.empty(1, 256, 2, head_size, dtype=dtype) for _ in range(3)), causal=causal)

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    f"{str(dtype).removeprefix('torch.')} head size {size}, {variant}": _call(dtype, size, variant)
    for dtype, size, variant in CASES
} | {
    f"{str(dtype).removeprefix('torch.')} specialized, head size {size}, causal {causal}": _specialized(
        dtype, size, causal
    )
    for dtype in (torch.bfloat16, torch.float16)
    for size in (64, 128)
    for causal in (True, False)
}
