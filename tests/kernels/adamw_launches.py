"""What the compile check launches of `kernels/adamw.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.kernels.adamw import fused_adamw_

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _call(
    weight: torch.dtype,
    gradient: torch.dtype,
    state: torch.dtype = FP32,
    masters: bool = False,
    scaled: bool = True,
    **options: bool,
) -> Callable[[], None]:
    def run() -> None:
        sizes = (5000, 3, 2048)
        weights, gradients, averages, squares = (
            [torch.empty(size, dtype=dtype) for size in sizes] for dtype in (weight, gradient, state, state)
        )
        fused_adamw_(
            weights,
            gradients,
            averages,
            squares,
            lr=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            step=17,
            masters=[torch.empty(size) for size in sizes] if masters else None,
            gradient_scale=torch.empty(()) if scaled else None,
            **options,
        )

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    "adamw fp32": _call(FP32, FP32),
    "adamw fp32, bf16 gradients": _call(FP32, BF16),
    "adamw bf16 with masters": _call(BF16, BF16, masters=True),
    "adamw bf16 with masters, not scaled": _call(BF16, BF16, masters=True, scaled=False),
    "adamw bf16 with masters, fp32 gradients": _call(BF16, FP32, masters=True),
    "adamw fp16 with masters": _call(FP16, FP16, masters=True),
    "adamw bf16 to nearest": _call(BF16, BF16),
    "adamw bf16 rounded stochastically": _call(BF16, BF16, stochastic_rounding=True),
    "adamw bf16 rounded stochastically, bf16 state": _call(BF16, BF16, BF16, stochastic_rounding=True),
}
