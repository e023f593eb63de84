"""`megalm inspect`: the table and the picture of what a run noted of its layers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from megalm.cli import main
from megalm.train.layer_report import FIGURES, draw_layers, inspect_run, layer_names
from tests.end_to_end.workplace import make_workplace, megalm


@pytest.mark.slow
def test_a_run_that_was_sampled_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = make_workplace(tmp_path / "place")
    command = ("train", "recipe.yaml", "train.steps=6", "inspect.every=2", "parallel.tensor=2")
    for stop in ("4", "6"):  # and resumed in between
        done = megalm(place, *command, f"train.stop_at={stop}")
        assert done.returncode == 0, done.stderr
    run = place / "run"
    assert main(["inspect", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["samples"], result["picture"]) == (6, 3, str(run / "inspect.png"))
    assert list(result["layers"]) == layer_names(2)
    assert result["layers"]["blocks.1"].keys() == FIGURES.keys()
    assert main(["inspect", str(run)]) == 0
    title, heads, *rows, last = capsys.readouterr().out.splitlines()
    assert title == "step 6" and heads.split()[:3] == ["layer", "weight", "norm"] and last.endswith("run/inspect.png")
    assert [row.split()[0] for row in rows] == layer_names(2)
    assert f"{result['layers']['blocks.1']['attention_entropy']:.3g}" == rows[2].split()[-1]
    image = Image.open(run / "inspect.png")
    assert image.width > 1000 and len(image.convert("RGB").getcolors(2**20) or []) > 100


def test_a_run_that_was_not_sampled_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert "no such run; give the run.dir of a run" in capsys.readouterr().err
    from tests.end_to_end.workplace import RECIPE

    (tmp_path / "config.yaml").write_text(RECIPE)
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "inspect.jsonl: no layer was sampled in this run; train it on with inspect.every=100" in error
    assert error.count("\n") == 1 and not (tmp_path / "inspect.png").exists()


def test_values_that_are_not_finite_are_left_out_of_the_picture(tmp_path: Path) -> None:
    samples = [
        {"step": step, **{f"blocks.0/{what}": math.inf if step == 2 else float(step) for what in FIGURES}}
        for step in (1, 2, 3)
    ]
    draw_layers(tmp_path / "picture.png", samples, layer_names(1), "title")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    with pytest.raises(OSError):
        draw_layers(tmp_path / "gone" / "picture.png", samples, layer_names(1), "title")
    with pytest.raises(Exception, match="no such run"):
        inspect_run(tmp_path / "gone")
