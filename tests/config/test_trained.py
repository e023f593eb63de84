"""What may be set anew for a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.load import dump_yaml, load_recipe
from megalm.config.trained import trained_config
from megalm.errors import ConfigError
from tests.config.recipes import write_recipe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that was trained on 2 x 2 processes with ZeRO."""
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "zero.stage=1"]
    config = load_recipe(write_recipe(tmp_path), [*overrides, "zero.config=zero1", "parallel.partition=[1,3]"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(config))
    return tmp_path / "run"


def test_a_trained_model_is_laid_out_on_one_process(run: Path) -> None:
    config = trained_config(run, ())
    assert (config.parallel.tensor, config.parallel.pipeline, config.zero.stage) == (1, 1, 0)
    assert config.parallel.sequence is False and config.parallel.partition is None
    assert config.zero.config is None
    assert config.model.layers == 4


def test_the_layout_and_the_evaluation_may_be_chosen(run: Path) -> None:
    config = trained_config(run, ["parallel.tensor=4", "evaluate.sequences=3", "data.path=other"])
    assert (config.parallel.tensor, config.evaluate.sequences, config.data.path) == (4, 3, "other")


def test_a_model_that_was_trained_compiled_takes_any_schedule(run: Path) -> None:
    recipe = run / "config.yaml"
    recipe.write_text(recipe.read_text().replace("compile: false", "compile: true"))
    config = trained_config(run, ["parallel.pipeline=2", "parallel.schedule=zb-v", "parallel.partition=[1,1,1,1]"])
    assert (config.parallel.schedule, config.train.compile) == ("zb-v", False)


def test_a_model_that_was_trained_in_fp8_is_computed_in_bf16_wherever_it_is(run: Path) -> None:
    recipe = run / "config.yaml"
    recipe.write_text(recipe.read_text().replace("fp8: none", "fp8: rowwise").replace("fp32", "bf16"))
    config = trained_config(run, ["run.device=cpu"])
    assert (config.train.fp8, config.precision) == ("none", "bf16")
    with pytest.raises(ConfigError, match=r"train\.fp8=rowwise cannot be set for a trained model"):
        trained_config(run, ["train.fp8=rowwise"])


@pytest.mark.parametrize("override", ["model.layers=2", "seed=3", "optim.lr=1", "train.steps=3", "zero.stage=3"])
def test_what_training_has_fixed_may_not(run: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override} cannot be set for a trained model; what may change"):
        trained_config(run, [override])


def test_a_misspelt_key_gets_the_nearest_name(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        trained_config(run, ["parallel.tensr=2"])


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"run\.dir"):
            trained_config(path, ())
