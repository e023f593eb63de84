"""The table of choices, made tiny: every choice is a valid recipe, and a run ends in figures, a table and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import recipes

from tests.end_to_end.workplace import make_data


def options(data: Path) -> argparse.Namespace:
    return argparse.Namespace(data=str(data), steps=10, seeds=2, hidden=64, sequence=16, batch=4)


def test_each_choice_is_a_recipe_of_as_many_weights(tmp_path: Path) -> None:
    configs = [recipes.recipe(options(tmp_path), choice.settings, 0.01, 0) for choice in recipes.CHOICES]
    assert len({choice.name for choice in recipes.CHOICES}) == len(configs) >= 25
    weights = {config.model.feed_forward * (3 if config.model.has_gated_activation else 2) for config in configs}
    assert weights == {3 * 192}


def test_a_run_gives_figures_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path / "data")
    out = tmp_path / "out" / "choices"
    sizes = ["--steps=4", "--seeds=2", "--hidden=16", "--sequence=16", "--batch=2", "--jobs=1"]
    monkeypatch.setattr(recipes, "SWEEP_SEEDS", (1000,))
    monkeypatch.setattr(
        sys, "argv", ["recipes.py", f"--data={tmp_path / 'data'}", "--groups", "norms", *sizes, f"--out={out}"]
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(recipes.__file__).parent))
    recipes.main()
    printed = capsys.readouterr().out
    measured = json.loads(out.with_suffix(".json").read_text())["measured"]
    assert len(measured["walks"]["adamw"]) >= 2 and measured["rates"]["adamw"] in dict(measured["walks"]["adamw"])
    assert set(measured["losses"]) == {"baseline", "layernorm before", "rmsnorm after", "rmsnorm before and after"}
    assert recipes.table(measured) in printed and "| norms | rmsnorm before |" in printed
    assert out.with_suffix(".png").stat().st_size > 10_000

    some = ["recipes.py", f"--data={tmp_path / 'data'}", "--choices", "relu", "muon", *sizes, f"--out={out}"]
    monkeypatch.setattr(sys, "argv", some)
    recipes.main()
    both = json.loads(out.with_suffix(".json").read_text())["measured"]
    assert both["losses"].keys() == measured["losses"].keys() | {"relu", "muon"}
    assert both["walks"].keys() == {"adamw", "muon"} and both["walks"]["adamw"] == measured["walks"]["adamw"]
    monkeypatch.setattr(sys, "argv", [*some, "--steps=5"])
    with pytest.raises(SystemExit, match="measured with --steps 4"):
        recipes.main()
    measured["losses"]["baseline"][0] += 0.1
    with pytest.raises(SystemExit, match=r"the baseline was .* measure all choices anew"):
        recipes.joined(measured, both)


def test_an_interval_is_students() -> None:
    assert recipes.half_width([0.1, 0.2, 0.3]) == pytest.approx(4.303 * 0.1 / 3**0.5)
