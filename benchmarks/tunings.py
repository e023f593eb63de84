"""What the tuner tries: for each kernel of the launch tables a grid of settings, and sizes for which it looks for rows.

Every row of every table for a GPU is served by a point here: one that is not could only be written by hand, and would
hide what the tuner writes after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel_cases import Case, Sizes, attention

Settings = dict[str, Any]
Legal = Callable[[Settings, Sizes], bool]


@dataclass(frozen=True)
class Point:
    """Where a row is looked for: sizes up to `up_to` (None: all that are larger) are served by what is best here."""

    up_to: int | None
    case: Case
    pass_name: str = "forward"


@dataclass(frozen=True)
class Tuning:
    """A kernel's grid of settings, which must have all keys of the rows at its points."""

    file: str
    kernel: str
    grid: Mapping[str, Sequence[int]] = field(hash=False)
    points: Sequence[Point]
    legal: Legal = lambda settings, sizes: True
    """Whether a setting may be launched at all at these sizes."""
    asked_for_by: Mapping[str, Settings] = field(default_factory=dict, hash=False)
    """Settings of other kernels of the file, by kernel, with which they hand their work over to this one."""

    @property
    def name(self) -> str:
        """file/kernel."""
        return f"{self.file}/{self.kernel}"

    def settings(self, sizes: Sizes) -> Iterator[Settings]:
        """Yield every setting of the grid that is legal."""
        for values in itertools.product(*self.grid.values()):
            settings = dict(zip(self.grid, values, strict=True))
            if self.legal(settings, sizes):
                yield settings


_TILES = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
_KEY_TILES = {**_TILES, "BLOCK_M": (16, 32, 64, 128)}  # it holds two sums, so few queries at a time
_FP32_TILES = {"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
_ATTENTION = (("forward", "forward", _TILES), ("query_gradients", "backward", _TILES),
              ("key_gradients", "backward", _KEY_TILES))  # fmt: skip


def _attention_points(pass_name: str, more: Sizes) -> list[Point]:
    """Return a point for each width of a table's rows; dropout stands for all that takes the rows named extra."""
    tokens = 4096 if more.get("bytes") == 4 else 8192
    points = []
    for up_to, heads, features in ((32, 64, 32), (64, 32, 64), (128, 16, 128), (None, 8, 256)):
        case = attention(f"D{features}", B=2, T=tokens, H=heads, E=features).with_sizes(**more)
        points.append(Point(up_to, case, pass_name))
    return points


def _attention() -> Iterator[Tuning]:
    for kernel, pass_name, tiles in _ATTENTION:
        for suffix, more in (("", {}), ("_fp32", {"bytes": 4})):
            grid = _FP32_TILES if suffix else tiles
            yield Tuning("attention", kernel + suffix, grid, _attention_points(pass_name, more))
            grid = grid if suffix else {**grid, "BLOCK_M": tuple(sorted({32, *grid["BLOCK_M"]}))}
            extra = _attention_points(pass_name, {**more, "dropped": 10})
            yield Tuning("attention", f"{kernel}{suffix}_extra", grid, extra)
    yield Tuning(
        "attention",
        "specialized_forward",
        {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
        [
            Point(64, attention("D64", B=2, T=8192, H=32, E=64)),
            Point(None, attention("D128", B=2, T=8192)),  # it serves no larger heads
        ],
        asked_for_by={"forward": {"specialized": True}},
    )


_BLOCKS = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}
_ROWS = {"TILE": (1024, 2048, 4096, 8192, 16384), "STAGES": (1, 2, 3), "num_warps": (1, 2, 4, 8, 16)}
_SHARES = {**_ROWS, "TILE": (1024, 2048, 4096, 8192), "PER_PROCESSOR": (1, 2, 3, 4)}
_COLUMNS = {
    "TILE": (2048, 4096, 8192),
    "COLUMNS": (256, 512, 1024),
    "PER_PROCESSOR": (1, 2, 4),
    "STAGES": (1, 2, 3),
    "num_warps": (8, 16),
}


def _loops(width: str) -> Legal:
    """Say that stages are for loops alone: a row that a tile holds has none."""
    return lambda settings, sizes: settings["STAGES"] == 1 or settings["TILE"] < sizes[width]


def _holds_rows(settings: Settings, sizes: Sizes) -> bool:
    """Say that a tile holds whole rows: else the backward pass needs COLUMNS."""
    return settings["TILE"] >= sizes["D"]


def _norm_points(widths: Sequence[int | None], pass_name: str, more: Sizes, widest: int = 16384) -> list[Point]:
    points = []
    for up_to in widths:
        width = up_to or widest
        sizes = {"N": 2**26 // width, "D": width, "R": 1, **more}
        points.append(Point(up_to, Case(f"D{width}", "rms_norm", sizes), pass_name))
    return points


def _norm() -> Iterator[Tuning]:
    for suffix, more in (("", {}), ("_fp32", {"bytes": 4})):
        widths = (512, 1024, 2048, 4096, 8192, 16384, None)
        points = _norm_points(widths, "forward", more, widest=65536)
        yield Tuning("norm", f"forward{suffix}", _ROWS, points, legal=_loops("D"))
        for kernel, drawn, whole in (("backward", {}, 8192), ("backward_dropout", {"dropped": 10}, 4096)):
            widths = tuple(width for width in (256, 1024, 2048, 4096, 8192) if width <= whole)
            points = _norm_points(widths, "backward", {**more, **drawn})
            yield Tuning("norm", kernel + suffix, _SHARES, points, legal=_holds_rows)
            points = _norm_points((None,), "backward", {**more, **drawn})
            yield Tuning("norm", kernel + suffix, _COLUMNS, points)
    grid = {"BLOCK": (2048, 4096, 8192), "STAGES": (1, 2, 3), "num_warps": (4, 8, 16)}
    yield Tuning("norm", "row_means", grid, _norm_points((None,), "backward", {}))
    grid = {"ROWS": (64, 128, 256), "BLOCK": (16, 32, 64, 128), "num_warps": (4, 8)}
    yield Tuning("norm", "add_partial", grid, _norm_points((None,), "backward", {}, widest=4096))


def _softmax(pass_name: str) -> list[Point]:
    sizes = ((1024, 1024, 256, 1024), (2048, 2048, 64, 2048), (4096, 4096, 16, 4096), (8192, 8192, 4, 8192),
             (16384, 16384, 1, 16384), (None, 65536, 1, 4096))  # fmt: skip
    return [
        Point(up_to, Case(f"T{t}", "softmax", {"M": m, "T": t, "Q": q, "E": 128}), pass_name)
        for up_to, t, m, q in sizes
    ]


def _cross_entropy(pass_name: str, rows: int, vocab: int) -> Point:
    case = Case(f"V{vocab}", "cross_entropy", {"N": rows, "V": vocab})
    return Point(vocab if vocab < 10_000 else None, case, pass_name)


def _losses() -> Iterator[Tuning]:
    grid = {"DEPTH": (2, 4, 8), "LANES": (512, 1024, 2048), "num_warps": (4, 8, 16)}
    yield Tuning("cross_entropy", "statistics", grid, [_cross_entropy("forward", 8192, 128256)])
    points = [_cross_entropy("backward", 2**18, 1024), _cross_entropy("backward", 8192, 128256)]
    yield Tuning("cross_entropy", "gradient", _BLOCKS, points)


def _elementwise() -> Iterator[Tuning]:
    rotary = Case("E128", "rotary", {"B": 2, "T": 8192, "H": 32, "G": 8, "E": 128})
    grid = {"PAIRS": (512, 1024, 2048, 4096), "HEADS": (2, 4, 8, 16), "num_warps": (2, 4, 8)}
    yield Tuning("rotary", "turn", grid, [Point(None, rotary)])
    swiglu = Case("F14336", "swiglu", {"N": 16384, "F": 14336})
    gelu = Case("F16384", "bias_gelu", {"N": 16384, "F": 16384})
    for pass_name in ("forward", "backward"):
        shares = {"PER_PROCESSOR": (2, 3, 5, 8)} if pass_name == "backward" else {}
        yield Tuning("activations", f"gated_{pass_name}", _BLOCKS, [Point(None, swiglu, pass_name)])
        yield Tuning("activations", f"gelu_{pass_name}", {**_BLOCKS, **shares}, [Point(None, gelu, pass_name)])
    yield Tuning("dropout", "dropout", _BLOCKS, [Point(None, Case("D4096", "dropout", {"N": 16384, "D": 4096}))])


_PRODUCTS = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64), "GROUP": (8,), "num_warps": (4, 8),
             "num_stages": (2, 3, 4)}  # fmt: skip
_FP32_PRODUCTS = {**_PRODUCTS, "BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "BLOCK_K": (16, 32)}


def _experts() -> Iterator[Tuning]:
    many = Case("8 experts", "grouped_matmul", {"N": 16384, "E": 8, "D": 2048, "F": 8192})
    few = Case("256 experts", "grouped_matmul", {"N": 16384, "E": 256, "D": 2048, "F": 768})
    for suffix, more, grid in (
        ("", {}, _PRODUCTS),
        ("_odd", {"D": 2047}, _PRODUCTS),
        ("_fp32", {"bytes": 4}, _FP32_PRODUCTS),
    ):
        case = many.with_sizes(**more)
        points = [*([] if suffix else [Point(64, few, "both")]), Point(None, case, "both")]
        yield Tuning("grouped_matmul", f"products{suffix}", grid, points)  # two of a step's three products
        yield Tuning("grouped_matmul", f"weight_gradients{suffix}", grid, [Point(None, case, "backward")])


def _parameters() -> Iterator[Tuning]:
    """Yield those that work on weights and gradients."""
    case = Case("P1e9", "adamw", {"P": 1_000_000_000, "C": 100, "M": 0})
    yield Tuning("adamw", "step", {"BLOCK": (1024, 2048, 4096), "num_warps": (4, 8)}, [Point(None, case)])
    narrow, wide = (Case(f"D{d}", "embedding", {"N": 16384, "V": 128256, "D": d}) for d in (512, 4096))
    grid = {"PIECE": (32, 64, 128, 256), "DEPTH": (2, 4, 8), "BLOCK_D": (256, 512, 1024), "num_warps": (2, 4, 8)}
    yield Tuning("embedding", "sum_pieces", grid, [Point(512, narrow, "backward"), Point(None, wide, "backward")])
    grid = {"DEPTH": (4, 8, 16), "BLOCK_D": (128, 256, 512), "num_warps": (2, 4, 8)}
    yield Tuning("embedding", "add_pieces", grid, [Point(None, wide, "backward")])
    case = Case("P1e9", "grad_norm", {"P": 1_000_000_000, "C": 100})
    grid = {"CHUNK": (16384, 32768, 65536, 131072), "BLOCK": (1024, 2048, 4096), "num_warps": (4, 8)}
    yield Tuning("grad_norm", "sum_chunks", grid, [Point(None, case)])
    grid = {"BLOCK": (1024, 2048, 4096), "num_warps": (4, 8, 16)}
    yield Tuning("grad_norm", "add_sums", grid, [Point(None, case)])


TUNINGS: list[Tuning] = [
    *_attention(),
    *_norm(),
    Tuning("softmax", "forward", _ROWS, _softmax("forward"), legal=_loops("T")),
    Tuning("softmax", "backward", _ROWS, _softmax("backward"), legal=_loops("T")),
    *_losses(),
    *_elementwise(),
    *_experts(),
    *_parameters(),
]
