"""Figures, table and picture of scaling runs whose metrics are written by hand; points without figures say why."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megalm.bench.collect import collect, missing
from megalm.bench.plan import Point, point_directory
from megalm.cli import main
from tests.bench.points import make_run, write_steps
from tests.launch.fake_slurm import FakeSlurm

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def cells(out: Path) -> list[list[str]]:
    """Return the cells of the table's rows, the header first."""
    lines = [line for line in (out / "scaling.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_whole_run_becomes_figures_a_table_and_a_picture(out: Path) -> None:
    points = [Point(2, 8), Point(4, 8)]
    make_run(out, points)
    write_steps(out, points[0], [9.0, 9.0, *[2.0] * 8])
    write_steps(out, points[1], [9.0, 9.0, *[1.25] * 8], **{"time/data_s": 0.25, "time/compute_s": 0.5})
    result = collect(out)
    assert missing(result) is None
    assert json.loads((out / "scaling.json").read_text()) == result
    first, second = result["points"]
    assert (first["tokens_per_s"], second["tokens_per_s"]) == (400.0, 640.0)
    assert (first["efficiency"], second["efficiency"]) == (1.0, pytest.approx(0.8))
    assert (result["baseline_ranks"], result["warmup_steps"]) == (2, 2)
    header, *rows = cells(out)
    assert [dict(zip(header, row, strict=True))["efficiency"] for row in rows] == ["100.0%", "80.0%"]
    shown = dict(zip(header, rows[1], strict=True))
    assert (shown["step ms"], shown["tokens/s"], shown["MFU"], shown["peak memory"]) == (
        "1,250", "640", "25.0%", "1.00 GiB"
    )  # fmt: skip
    assert (shown["data ms"], shown["compute ms"], shown["communication ms"], shown["other ms"]) == (
        "250", "500", "-", "500"
    )  # fmt: skip
    assert "nodes" not in header
    assert (out / "scaling.png").read_bytes().startswith(PNG)


def test_weak_scaling_compares_tokens_a_rank(out: Path) -> None:
    points = [Point(1, 4), Point(4, 16)]
    make_run(out, points, mode="weak")
    write_steps(out, points[0], [1.0] * 10)
    write_steps(out, points[1], [1.25] * 10)
    assert [point["efficiency"] for point in collect(out)["points"]] == [1.0, pytest.approx(0.8)]
    assert "# Weak scaling of tiny.yaml" in (out / "scaling.md").read_text()


def test_a_failed_point_is_a_row_with_its_first_error(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [Point(1, 8, status=1), Point(2, 8, status=0), Point(4, 8, status=1)]
    make_run(out, points)
    write_steps(out, points[0], [1.0] * 3)
    (point_directory(out, points[0]) / "logs/train.log").write_text("RuntimeError: out | of memory\n")
    write_steps(out, points[1], [1.0] * 10)
    assert main(["bench", "collect", str(out)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: without figures, 2 of 3 points: 1 rank: 3 of 10 steps: RuntimeError: out")
    assert f"{out}/scaling.png" in told.out
    rows = cells(out)
    assert rows[1][2] == "failed: 3 of 10 steps: RuntimeError: out \\| of memory (points/ranks-1/logs/train.log)"
    assert rows[2][5] == "100.0%"  # against the smallest point that was measured
    assert rows[3][2] == "failed: 0 of 10 steps: ended with status 1"
    assert (out / "scaling.png").read_bytes().startswith(PNG)


def test_without_any_figures_there_is_a_table_and_no_picture(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(out, [Point(1, 8), Point(2, 8)])
    (out / "scaling.png").write_bytes(b"of an earlier time")
    assert main(["bench", "collect", str(out)]) == 1
    assert capsys.readouterr().out.endswith("no picture\n")
    assert not (out / "scaling.png").exists()
    assert cells(out)[1][2] == "not over: 0 of 10 steps, and no log says why"


def test_slurm_says_what_became_of_a_job(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    fake.answers("squeue", "11|RUNNING|None|1:05|n1\n12|PENDING|Dependency|0:00|\n14|TIMEOUT|TimeLimit|5:00|n1\n")
    fake.answers("sacct", "CANCELLED by 0|0:0|00:00:00|\n")
    points = [Point(ranks, 8, nodes, str(10 + nodes)) for nodes, ranks in ((1, 8), (2, 16), (3, 24), (4, 32))]
    make_run(out, points)
    collect(out)
    whys = [row[3] for row in cells(out)[1:]]
    assert whys == [
        "not over: job 11 is RUNNING, 0 of 10 steps",
        "not over: job 12 is PENDING, 0 of 10 steps",
        "failed: 0 of 10 steps: job 13 is CANCELLED (exit status 0:0)",
        "failed: 0 of 10 steps: job 14 is TIMEOUT (TimeLimit)",
    ]
    fake.answers("squeue", "slurm_load_jobs error: Unable to contact\n", code=1)
    (point_directory(out, points[0]) / "logs/job-11.log").write_text("slurmstepd: error: *** DUE TO TIME LIMIT ***\n")
    collect(out)
    assert cells(out)[1][3].startswith("failed: 0 of 10 steps: slurmstepd: error: *** DUE TO TIME LIMIT ***")


def test_points_that_were_submitted_by_hand_are_found(out: Path, tmp_path: Path) -> None:
    from tests.config.recipes import SMALL

    for ranks, batch in ((1, 12), (2, 24)):
        folder = out / f"points/ranks-{ranks}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(SMALL.replace("global_batch: 12", f"global_batch: {batch}\n  stop_at: 8"))
        write_steps(out, Point(ranks, batch), [1.0] * 8)
    result = collect(out)
    assert (result["mode"], result["steps"], result["sequence"]) == ("weak", 8, 16)
    assert [point["tokens_per_s"] for point in result["points"]] == [192.0, 384.0]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no points of a scaling run"), ("{", "no plan"), ('{"points": []}', "no plan")]
)
def test_a_directory_without_a_scaling_run_is_refused(
    out: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    out.mkdir()
    if text is not None:
        (out / "plan.json").write_text(text)
    assert main(["bench", "collect", str(out)]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1
    assert not (out / "scaling.json").exists()
