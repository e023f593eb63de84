"""Triton's interpreter with bfloat16 that is right: for tests of kernels on a machine without a GPU.

The interpreter of triton 3.6 to 3.9 holds bf16 values as uint16. It casts fp32 to bf16 by cutting bits off, and its
arithmetic and matrix products take the bits for integers. Here values go through fp32, and casts round to nearest even.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def repair_bf16() -> None:
    """Replace the interpreter's casts, arithmetic and products by ones that know bf16. Call once a process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bf16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def widen(handle: Any) -> Any:
        return TensorHandle(_to_fp32(handle.data), tl.float32) if is_bf16(handle) else handle

    def narrow(handle: Any) -> Any:
        return TensorHandle(_to_bf16(handle.data.astype(np.float32)), tl.bfloat16)

    cast_impl, binary_op = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    unary_op, create_dot = InterpreterBuilder.unary_op, InterpreterBuilder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if is_bf16(source) else narrow(source)
        return cast_impl(self, widen(source), target)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not is_bf16(left):
            return binary_op(self, left, right, operation)
        result = binary_op(self, widen(left), widen(right), operation)
        return result if result.data.dtype == np.bool_ else narrow(result)

    def unary(self: Any, value: Any, operation: Any) -> Any:
        return narrow(unary_op(self, widen(value), operation)) if is_bf16(value) else unary_op(self, value, operation)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), d, *rest)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.unary_op = unary
    InterpreterBuilder.create_dot = dot


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bf16, ties to even, NaN kept a NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
