"""The quick start's order, its gate and what it tells; `make quickstart` runs the real thing."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from megalm import cli, quickstart
from megalm.config.load import load_recipe
from megalm.errors import ConfigError, MegalmError, UserError
from megalm.quickstart import LAYOUT, RECIPE, Perplexities


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace every phase by a note that it ran."""
    done: list[str] = []

    def note(name: str, result: Any = None) -> Any:
        def phase(*arguments: Any) -> Any:
            done.append(name)
            return result

        return phase

    monkeypatch.setattr(quickstart, "_prepared", note("prepare"))
    monkeypatch.setattr(quickstart, "run_workers", note("train", 0))
    monkeypatch.setattr(quickstart, "_evaluate", note("evaluate", Perplexities(150.0, 211.0, 94.0)))
    monkeypatch.setattr(quickstart, "_draw", note("draw"))
    monkeypatch.setattr(quickstart, "_sample", note("sample"))
    return done


def test_phases_run_in_order_and_are_announced(
    phases: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert quickstart.run(tmp_path) == 0
    assert phases == ["prepare", "train", "evaluate", "draw", "sample"]
    told = capsys.readouterr().out
    assert [f"[{number}/5]" in told for number in range(1, 6)] == [True] * 5
    assert "on 4 processes" in told and "zero.stage=1" in told


def test_every_command_that_is_told_is_one_that_the_command_line_takes(
    phases: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quickstart.run(tmp_path)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    commands = [line for line in lines if line.startswith("megalm ")]
    assert len(commands) >= 5
    for command in commands:
        parsed = cli.parse(shlex.split(command)[1:])
        assert parsed.function is not None
        if hasattr(parsed, "recipe"):
            load_recipe(parsed.recipe, parsed.overrides)


def test_wrong_overrides_are_found_before_anything_is_done(phases: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        quickstart.run(tmp_path, ["model.heads=5"])
    assert phases == []


def test_a_place_for_no_run_is_found_before_anything_is_done(
    phases: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    for out, said in ((file, "is no directory; choose"), (tmp_path, "holds tokenizer.json but no run.json, so whose")):
        with pytest.raises(ConfigError, match=said):
            quickstart.run(out)
    assert (phases, capsys.readouterr().out) == ([], "")


def test_failed_training_fails_the_quick_start(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quickstart, "run_workers", lambda *arguments: 1)
    with pytest.raises(MegalmError, match="training ended with status 1"):
        quickstart.run(tmp_path)
    assert "evaluate" not in phases


def test_a_mistake_of_the_user_stays_one(phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quickstart, "run_workers", lambda *arguments: 2)
    with pytest.raises(UserError, match="training ended with status 2"):
        quickstart.run(tmp_path)


@pytest.mark.parametrize("reached", [211.0, float("nan")])
def test_a_model_that_is_no_better_than_counting_pairs_fails(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reached: float
) -> None:
    monkeypatch.setattr(quickstart, "_evaluate", lambda *arguments: Perplexities(reached, 211.0, 94.0))
    with pytest.raises(MegalmError, match="is not below the add-one bigram"):
        quickstart.run(tmp_path)


def test_the_recipe_is_laid_out_on_four_processes() -> None:
    config = load_recipe(RECIPE, LAYOUT)
    assert (config.parallel.tensor, config.parallel.pipeline, config.zero.stage) == (2, 2, 1)
