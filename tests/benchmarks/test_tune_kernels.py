"""The tuner: what it writes into a launch table, and that it launches what it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, attention
from kernel_race import SEED, TOLERANCE, Judge, Race, results_of
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction
from tune_kernels import TABLES, formatted, overridden, time_settings, with_rows, write_rows
from tunings import TUNINGS, Point, Tuning

from megalm.kernels import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLE = {
    "forward": [
        {"arch": "interpreter", "BLOCK": 32},
        {"arch": "sm_90", "up_to": 64, "BLOCK": 64},
        {"arch": "sm_80", "BLOCK": 16},
        {"BLOCK": 8},
    ],
    "backward": [{"BLOCK": 4}],
}


def test_rows_replace_those_of_their_size_and_stand_before_the_others_in_order() -> None:
    table = with_rows(TABLE, "forward", "sm_90", {None: {"BLOCK": 256}, 64: {"BLOCK": 65}, 32: {"BLOCK": 33}})
    assert table["forward"] == [
        {"arch": "sm_90", "up_to": 32, "BLOCK": 33},
        {"arch": "sm_90", "up_to": 64, "BLOCK": 65},
        {"arch": "sm_90", "BLOCK": 256},
        {"arch": "interpreter", "BLOCK": 32},
        {"arch": "sm_80", "BLOCK": 16},
        {"BLOCK": 8},
    ]
    assert table["backward"] is TABLE["backward"]
    kept = with_rows(TABLE, "forward", "sm_90", {128: {"BLOCK": 129}})["forward"]
    assert kept[:2] == [{"arch": "sm_90", "up_to": 64, "BLOCK": 64}, {"arch": "sm_90", "up_to": 128, "BLOCK": 129}]


def test_a_written_table_has_a_row_a_line_and_is_written_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(TABLE))
    write_rows(path, "backward", "gfx942", {None: {"BLOCK": 5, "num_warps": 4}})
    text = path.read_text()
    assert '    {"arch": "gfx942", "BLOCK": 5, "num_warps": 4},\n    {"BLOCK": 4}\n' in text
    assert json.loads(text) == with_rows(TABLE, "backward", "gfx942", {None: {"BLOCK": 5, "num_warps": 4}})
    assert formatted(json.loads(text)) == text
    write_rows(path, "backward", "gfx942", {None: {"BLOCK": 5, "num_warps": 4}})
    assert path.read_text() == text


def test_the_kernels_find_the_rows_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = with_rows(TABLE, "forward", launch.architecture(), {64: {"BLOCK": 65}, None: {"BLOCK": 66}})
    monkeypatch.setattr(launch, "_table", lambda file: table)
    assert [launch.settings("planted", "forward", size)["BLOCK"] for size in (1, 64, 65)] == [65, 65, 66]


FEW = {
    "attention": {"B": 1, "T": 128, "H": 2, "G": 2},
    "softmax": {"M": 1, "Q": 2},
    "rms_norm": {"N": 2},
    "cross_entropy": {"N": 2},
    "rotary": {"T": 8},
    "swiglu": {"N": 2},
    "bias_gelu": {"N": 2},
    "dropout": {"N": 2},
    "adamw": {"P": 1000, "C": 2},
    "embedding": {"N": 512, "V": 100},
    "grouped_matmul": {"F": 16},
    "grad_norm": {"P": 1000, "C": 2},
}
"""Sizes for the host's part of an operation alone; those that choose a row stay as they are."""


def asked_sizes(tuning: Tuning, point: Point) -> set[int]:
    """Return the sizes for which the kernel's settings are asked for at a point; kernels do nothing meanwhile."""
    case = point.case.with_sizes(**FEW[point.case.op])
    sizes: set[int] = set()
    with overridden(tuning, None, sizes):
        results_of(case, case.operation.ours(case.sizes), case.inputs(DEVICE, SEED))
    return sizes


@pytest.mark.parametrize(
    "case",
    [
        attention("dropout", B=1, T=32, H=2, G=1, E=16).with_sizes(dropped=10),
        attention("fp32", B=1, T=32, H=1, E=16).with_sizes(bytes=4),
        Case("dropout", "rms_norm", {"N": 8, "D": 64, "R": 1, "dropped": 10}),
        Case("dropout", "layer_norm", {"N": 8, "D": 64, "R": 1, "dropped": 10, "bytes": 4}),
        Case("fewer queries", "softmax", {"M": 2, "T": 64, "Q": 8, "E": 64}),
    ],
    ids=lambda case: f"{case.op}, {case.name}",
)
def test_what_is_measured_for_the_tuner_alone_is_right(case: Case) -> None:
    errors = Judge(case, DEVICE).errors(case.operation.ours(case.sizes))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
def test_every_row_for_a_gpu_is_served_by_a_point_with_all_of_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GridExecutor, "__call__", lambda *arguments, **options: None)
    monkeypatch.setattr(JITFunction, "run", lambda *arguments, **options: None)
    tables = {path.stem: json.loads(path.read_text("utf-8")) for path in TABLES.glob("*.json")}
    reached: set[tuple[str, str, int]] = set()
    for tuning in TUNINGS:
        rows = tables[tuning.file][tuning.kernel]
        archs = {row.get("arch", "another") for row in rows} - {"interpreter"}
        for point in tuning.points:
            sizes = asked_sizes(tuning, point)
            assert sizes, f"{point.case.name} {point.pass_name} does not launch {tuning.name}"
            assert point.up_to is None or max(sizes) <= point.up_to, f"{tuning.name} at {point.case.name}: {sizes}"
            for arch, size in itertools.product(archs | {"another"}, sizes):
                number = next(i for i, row in enumerate(rows) if row_fits(row, arch, size))
                assert set(tuning.grid) == set(rows[number]) - {"arch", "up_to"}, f"{tuning.name}: {rows[number]}"
                reached.add((tuning.file, tuning.kernel, number))
    for file, table in tables.items():
        for kernel, rows in table.items():
            for number, row in enumerate(rows):
                assert row.get("arch") == "interpreter" or (file, kernel, number) in reached, f"{file}/{kernel}: {row}"


def row_fits(row: dict[str, Any], arch: str, size: int) -> bool:
    return row.get("arch", arch) == arch and size <= row.get("up_to", size)


def test_settings_are_overridden_for_one_kernel_and_only_inside() -> None:
    before = launch.settings("activations", "gated_forward", 64)
    sizes: set[int] = set()
    asked_for_by = {"gelu_forward": {"BLOCK": 5}}
    tuning = Tuning("activations", "gated_forward", {}, [], asked_for_by=asked_for_by)
    with overridden(tuning, {"BLOCK": 7}, sizes):
        assert launch.settings("activations", "gelu_forward", 32)["BLOCK"] == 5
        assert launch.settings("activations", "gated_forward", 64) == {"BLOCK": 7}
        assert launch.settings("activations", "gated_backward", 32) != {"BLOCK": 7}
    assert launch.settings("activations", "gated_forward", 64) == before
    assert sizes == {64}


def test_settings_that_fail_are_counted_and_the_others_timed() -> None:
    point = Point(64, Case("F64", "swiglu", {"N": 4, "F": 64}))
    tuning = Tuning("activations", "gated_forward", {"BLOCK": (64, 48, 128), "num_warps": (4,)}, [point])
    judge, race = Judge(point.case, DEVICE), Race(point.case, DEVICE)
    timed, failed = time_settings(tuning, point, list(tuning.settings({})), 2, judge, race)
    assert sorted(settings["BLOCK"] for _, settings in timed if settings) == [64, 128]
    assert sum(failed.values()) == 1  # 48 is no power of two
    assert [seconds for seconds, _ in timed] == sorted(seconds for seconds, _ in timed)
