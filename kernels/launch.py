"""Where a kernel runs and with which launch settings. Every file of this package asks here.

An operation takes its kernel for tensors on a GPU in fp32, bf16 or fp16, and for those on a CPU where Triton's
interpreter is on (TRITON_INTERPRET=1 before the first import); for all others the plain torch of `reference`. On the
meta device it takes the kernel's shapes, as on a GPU.

Settings are fixed tables, one JSON an operation's file in `tables/`, so that nothing is tuned while a job starts:

    {"forward": [{"arch": "sm_90", "up_to": 64, "BLOCK_M": 128, "num_warps": 4}, ..., {"BLOCK_M": 64, "num_warps": 4}]}

The first row that fits counts: `arch` absent fits every architecture, `up_to` absent every size. All other keys are
handed to the kernel. `benchmarks/tune_kernels.py` writes rows that it has measured.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton decides at the import of a kernel whether it is compiled or interpreted."""

_PROCESSORS_WITHOUT_GPU = 3  # few and odd: each runs for long in the interpreter, and shares are uneven in tests


def fused(*tensors: Tensor | None) -> bool:
    """Return whether an operation on these tensors takes its kernel: see the module's text. None is passed over.

    Raises ValueError for tensors of a GPU that is not the current one: Triton launches on that.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    elsewhere = [t.device for t in given if t.is_cuda and t.get_device() != torch.cuda.current_device()]
    if elsewhere:
        here = f"cuda:{torch.cuda.current_device()}"
        raise ValueError(f"tensors on {elsewhere[0]} while {here} is current; call torch.cuda.set_device before")
    return all(
        (t.is_cuda or t.is_meta or INTERPRETED) and (t.dtype in DTYPES or not t.is_floating_point()) for t in given
    )


def architecture() -> str:
    """Return what the launch tables call the current GPU ("sm_90", "gfx942"), "interpreter" without one."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def settings(file: str, kernel: str, size: int = 0) -> dict[str, Any]:
    """Return the launch settings of one kernel: the row of `tables/{file}.json` for this architecture and size."""
    return dict(_settings(file, kernel, size, architecture()))


@functools.lru_cache(maxsize=4096)
def _settings(file: str, kernel: str, size: int, arch: str) -> dict[str, Any]:
    for row in _table(file)[kernel]:
        if row.get("arch", arch) == arch and size <= row.get("up_to", size):
            return {key: value for key, value in row.items() if key not in ("arch", "up_to")}
    raise ValueError(f"tables/{file}.json has no row of {kernel} for {arch} and size {size}; add one without arch")


@functools.cache
def _table(file: str) -> dict[str, list[dict[str, Any]]]:
    path = Path(__file__).parent / "tables" / f"{file}.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(path.read_text("utf-8"))
    return rows


def processors(device: torch.device) -> int:
    """Return how many programs run side by side on the device, one a streaming multiprocessor."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_GPU
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def signed_key(key: int) -> int:
    """Return a 64-bit Philox key (0 .. 2^64-1) as the int64 of the same bits, which kernels and schemas take."""
    return key - 2**64 if key >= 2**63 else key
