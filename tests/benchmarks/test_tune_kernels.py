"""The tuner: what it writes into a launch table, and that it launches what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kernel_cases import Case
from kernel_race import Judge, Race
from tune_kernels import TABLES, TUNINGS, Point, Tuning, formatted, overridden, time_settings, with_rows, write_rows

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


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning.name)
def test_a_grid_has_the_keys_of_its_table(tuning: Tuning) -> None:
    rows = json.loads((TABLES / f"{tuning.file}.json").read_text("utf-8"))[tuning.kernel]
    assert set(tuning.grid) in [set(row) - {"arch", "up_to"} for row in rows]


def test_settings_are_overridden_for_one_kernel_and_only_inside() -> None:
    before = launch.settings("activations", "gated_forward", 64)
    sizes: set[int] = set()
    with overridden("activations", "gated_forward", {"BLOCK": 7}, sizes):
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
