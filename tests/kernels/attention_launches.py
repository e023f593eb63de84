"""What the compile check launches of `kernels/attention.py`: the rows of each target, by head size and class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    "part of a matrix, documents, lse": lambda: {
        "causal": True,
        "documents": (torch.empty(TOKENS, dtype=torch.int64), torch.empty(TOKENS, dtype=torch.int64)),
        "within": (3 * TOKENS, TOKENS, 8 * TOKENS, 8 * TOKENS),
        "return_lse": True,
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
    "lengths, softcap, alibi": lambda: {
        "causal": False,
        "window": 100,
        "softcap": 30.0,
        "alibi_slopes": torch.empty(8),
        "key_lengths": torch.empty(1, dtype=torch.int32),
        "return_lse": True,
    },
    "lengths, odd dropout": lambda: {
        "causal": False,
        "window": 100,
        "key_lengths": torch.empty(1, dtype=torch.int32),
        "dropout": 0.1,
        "seed": 2**63,
    },
}
EVERYTHING = "lengths, softcap, alibi, odd dropout, lse"


@dataclass(frozen=True)
class Shape:
    """What Triton compiles kernels of their own for: a 1, a multiple of 16, the dtype of a split sum."""

    heads: int = 8
    groups: int = 2
    queries: int = TOKENS
    """With one, as in generation, nothing is differentiated."""
    keys: int = TOKENS
    processors: int = 1
    """With more of them than programs, the heads that share a key head are split, and dk and dv are fp32."""


SHAPES = {
    "grouped": Shape(),
    "multi-head": Shape(groups=8),
    "one head, odd length": Shape(heads=1, groups=1, queries=TOKENS - 12, keys=TOKENS - 12),
    "one query": Shape(queries=1),
    "split heads": Shape(processors=1000),
}


def _call(dtype: torch.dtype, head_size: int, variant: str, shape: Shape = SHAPES["grouped"]) -> Callable[[], None]:
    def run() -> None:
        options = VARIANTS[variant]()
        keys = shape.keys - 3 * ("odd" in variant)
        with_gradients = shape.queries > 1
        q = torch.empty(1, shape.queries, shape.heads, head_size, dtype=dtype, requires_grad=with_gradients)
        k, v = (
            torch.empty(1, keys, shape.groups, head_size, dtype=dtype, requires_grad=with_gradients) for _ in range(2)
        )
        with mock.patch.object(launch, "processors", lambda device: shape.processors):
            results = flash_attention(q, k, v, **options)
            results = results if isinstance(results, tuple) else (results,)
            if with_gradients:
                torch.autograd.backward(results, [torch.empty_like(x) for x in results])

    return run


# Of the two last, which EVERYTHING is made of, each is compiled where they are not together: with all at once sm_90
# spills 48 bytes of a thread in the gradients of heads of 256, in 16 bits, and no one trains so.
CASES = [
    *((torch.bfloat16, size, variant) for size in (32, 64, 128) for variant in list(VARIANTS)[:5]),
    *((torch.bfloat16, 256, variant) for variant in VARIANTS if variant != EVERYTHING),
    *((torch.bfloat16, size, "causal") for size in (40, 80, 192)),
    *((torch.float32, size, variant) for size in (32, 64, 128, 256) for variant in ("causal", EVERYTHING)),
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


LAUNCHES: dict[str, Callable[[], None]] = (
    {
        f"{str(dtype).removeprefix('torch.')} head size {size}, {variant}": _call(dtype, size, variant)
        for dtype, size, variant in CASES
    }
    | {
        f"bfloat16 head size {size}, causal, {name}": _call(torch.bfloat16, size, "causal", shape)
        for size in (64, 128, 256)
        for name, shape in SHAPES.items()
    }
    | {
        f"float32 head size 64, causal, {name}": _call(torch.float32, 64, "causal", SHAPES[name])
        for name in ("multi-head", "one head, odd length")
    }
    | {
        f"{str(dtype).removeprefix('torch.')} specialized, head size {size}, causal {causal}": _specialized(
            dtype, size, causal
        )
        for dtype in (torch.bfloat16, torch.float16)
        for size in (64, 128)
        for causal in (True, False)
    }
)
