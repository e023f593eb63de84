"""Recipes as users write them: inheritance, overrides, and every way to get one wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config import yaml_text
from megalm.config.load import dump_yaml, load_recipe, load_resolved, shipped_recipes
from megalm.config.run import RunConfig, key_fields
from megalm.errors import ConfigError
from tests.config.recipes import SMALL, write_recipe


def error_of(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_come_back_from_their_dump(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_resolved(tmp_path) == config


def test_the_promised_recipes_ship() -> None:
    promised = {"gpt-tiny", "gpt-124m", "gpt-1b", "llama-8b", "mixtral-8x7b", "gpt-22b", "gpt-175b", "llama-405b"}
    assert promised == shipped_recipes().keys()


def test_overrides_are_read_as_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = [
        "model.layers=3", "model.layers=2", "optim.lr=1e-4", "optim.betas=[0.8, 0.9]", "model.bias=false",
        "train.clip_grad_norm=null", "run.dir=7", "data.path=1e3", "run.dir=on",
    ]  # fmt: skip
    config = load_recipe(write_recipe(tmp_path), overrides)
    assert (config.model.layers, config.optim.lr, config.optim.betas) == (2, 1e-4, (0.8, 0.9))
    assert (config.model.bias, config.train.clip_grad_norm) == (False, None)
    assert (config.run.dir, config.data.path) == ("on", "1e3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.haeds=4", "command line: model.haeds: unknown key; did you mean model.heads?"),
        ("layers=4", "command line: layers: unknown key; did you mean model.layers?"),
        ("train.lr=4", "command line: train.lr: unknown key; did you mean optim.lr?"),
        ("modle.layers=4", "command line: modle.layers: unknown key; did you mean model.layers?"),
        ("model=4", "command line: model is a section; set one of its keys, such as model.layers=VALUE"),
        ("model.layers", "command line: 'model.layers' is not key=value; write model.layers=VALUE"),
        ("parallel.data=4", "command line: parallel.data: unknown key; the data ranks are those that the other axes"),
        ("zzz=1", "command line: zzz: unknown key; `megalm config show RECIPE` lists the keys"),
        ("model.layers=four", "command line: model.layers=four is not a whole number; write one such as 4"),
        ("model.layers=4.0", "command line: model.layers=4.0 is not a whole number; write 4"),
        ("model.layers=", "command line: model.layers=null is not a whole number; write one such as 4"),
        ("model.layers=[", "command line: model.layers=[:1: not valid YAML"),
        ("model.bias=1", "command line: model.bias=1 is neither true nor false"),
        ("run.dir=", "command line: run.dir=null is not text; write a name"),
        ("=", "command line: '=' is not key=value; write it as model.layers=4, without spaces"),
        ("base=gpt-tiny", "command line: base stands in a recipe's file alone; give that recipe in place of this one"),
        ("log.sinks=[wandb,wandb]", "command line: log.sinks=[wandb, wandb] names one twice; use [wandb]"),
        ("log.sinks=wandb", "command line: log.sinks=wandb is not a list; write one such as [wandb]"),
        ("log.sinks=", "command line: log.sinks=null is not a list; write one such as []"),
        ("parallel.partition=4", "command line: parallel.partition=4 is not a list; write one such as [1, 2], or null"),
        ("parallel.partition=[4,0]", "command line: parallel.partition[1]=0 is too small; use at least 1"),
        ("optim.rules=x", "command line: optim.rules=x is not a list; write one such as [{match: ...}]"),
        ("optim.rules=[3]", "command line: optim.rules=[3] has one that is not made of keys; write a list such as [{m"),
    ],
)
def test_a_wrong_override_is_one_line_with_the_remedy(tmp_path: Path, override: str, message: str) -> None:
    error = error_of(write_recipe(tmp_path), override)
    assert error.startswith(message)
    assert "\n" not in error


@pytest.mark.parametrize(
    ("override", "end"),
    [
        ("optim.state_dtype=fp32", "unknown state_dtype; known: bf16, or null, the default"),
        ("train.reduce_dtype=fp16", "known: bf16, fp32, or null, the default"),
        ("early_stop.metric=val_loss", "train/loss, or null, the default"),
        ("train.clip_grad_norm=0", "is too small; use more than 0, or null"),
        ("profile.ranks=all", "is not a list; write one such as [0], or null"),
        ("optim.lr=none", "is not a finite number; write one such as 0.1 or 1e-4, without quotes"),
        ("optim.kind=adamax", "sgd"),
    ],
)
def test_a_key_that_may_be_null_says_so(tmp_path: Path, override: str, end: str) -> None:
    assert error_of(write_recipe(tmp_path), override).endswith(end)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("heads: 12", "haeds: 12", "recipe.yaml: model.haeds: unknown key; did you mean heads?"),
        ("optim:", "optm:", "recipe.yaml: optm: unknown key; did you mean optim?"),
        ("  lr:", "  global_batch: 4\n  lr:", "optim.global_batch: unknown key; did you mean train.global_batch?"),
        ("heads: 12", 'heads: "12"', "model.heads=12 is text, not a whole number; write 12 without quotes"),
        ("heads: 12", "heads: true", "model.heads=true is not a whole number; write one such as 4"),
        ("heads: 12", "heads: 0", "model.heads=0 is too small; use at least 1"),
        ("heads: 12", "heads: 99999999999999999999", "model.heads=99999999999999999999 is too large; use at most"),
        ("heads: 12", "heads: 12\n  norm: layrnorm", "model.norm=layrnorm: unknown norm; did you mean layernorm?"),
        ("heads: 12", "heads: 12\n  norm: 1", "recipe.yaml: model.norm=1 is not text; put it in quotes"),
        ("heads: 12", "heads: 12\n  dropout: 1.0", "recipe.yaml: model.dropout=1.0 is too large; use less than 1"),
        ("lr: 1e-3", "lr: 0", "recipe.yaml: optim.lr=0 is too small; use more than 0"),
        ("lr: 1e-3", 'lr: "1e-3"', "optim.lr=1e-3 is not a finite number; write one such as 0.1 or 1e-4, without"),
        ("lr: 1e-3", "lr: .nan", "recipe.yaml: optim.lr=nan is"),
        ("lr: 1e-3", "lr: 1e-3\n  betas: 0.9", "optim.betas=0.9 is not a list; write one such as [0.9, 0.95]"),
        ("lr: 1e-3", "lr: 1e-3\n  betas: [0.9]", "recipe.yaml: optim.betas=[0.9] has 1 value; write 2"),
        ("lr: 1e-3", "lr: 1e-3\n  betas: [1, 2, 3]", "recipe.yaml: optim.betas=[1, 2, 3] has 3 values; write 2"),
        ("lr: 1e-3", "lr: 1e-3\n  betas: [0.9, 2]", "recipe.yaml: optim.betas[1]=2 is too large; use less than 1"),
        ("optim:\n  lr: 1e-3", "", "recipe.yaml: optim.lr: missing, and it has no default; set it"),
        ("optim:\n  lr: 1e-3", "optim: 3", "recipe.yaml: optim=3 is not a section; write its keys below `optim:`"),
        ("optim:\n", "optim.lr: 3\noptim:\n", "recipe.yaml: optim.lr: unknown key; write it as lr under `optim:`"),
        ("optim:\n", "1: 3\noptim:\n", "recipe.yaml: 1: unknown key; known here: base, batch_ramp, checkpoint, data"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_the_remedy(tmp_path: Path, old: str, new: str, message: str) -> None:
    error = error_of(write_recipe(tmp_path, SMALL.replace(old, new)))
    assert message in error
    assert "\n" not in error


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = SMALL.replace("heads: 12", "haeds: 12").replace("steps: 10", "steps: ten")
    text = text.replace("micro_batch: 2", "micro_batch: 5")
    error = error_of(write_recipe(tmp_path, text), "parallel.pipeline=9", "zero.stag=1")
    assert error.splitlines() == [
        "recipe.yaml and command line: 5 mistakes",
        "  recipe.yaml: model.haeds: unknown key; did you mean heads?",
        "  command line: zero.stag: unknown key; did you mean zero.stage?",
        "  recipe.yaml: train.steps=ten is not a whole number; write one such as 4, or null, the default",
        "  recipe.yaml: train.global_batch=12 is not divisible by train.micro_batch=5; use 1, 2, 3, 4, 6 or 12",
        "  command line: parallel.pipeline=9 is more than model.layers=4; use at most 4",
    ]  # fmt: skip


def test_a_rule_is_silent_about_keys_that_are_wrong_already(tmp_path: Path) -> None:
    error = error_of(write_recipe(tmp_path, SMALL.replace("heads: 12", "heads: -12")), "parallel.tensor=5")
    assert "model.heads=-12 is too small" in error
    assert "model.heads" not in error.replace("model.heads=-12", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; a recipe needs"),
        (b"# only a comment\n", "empty; a recipe needs"),
        (b"- 1\n- 2\n", "holds a list, not sections"),
        (b"just text", "holds the single value 'just text', not sections"),
        (b"\xff\xfe\x00binary\x80", "not UTF-8 text (byte 0)"),
        (b"a: \x00\x01", "not YAML text"),
        (b"model:\n  layers: 1\n  layers: 2\n", ":3: key layers is given twice, first in line 2; keep one"),
        (b"model: [1\n", "not valid YAML"),
        (b"a: b: c\n", ":1: not valid YAML"),
        (b"x: !!python/object/apply:os.system ['touch pwned']\n", ":1: the tag !!python/object/apply:os.system is"),
        (b"x: !!python/name:os.system\n", "the tag !!python/name:os.system is refused"),
        (b"x: !custom 1\n", "the tag !!custom is refused"),
        (b"x: 2020-13-45\n", "a value cannot be read"),
        (b"[" * 5000, "nested too deeply"),
        (b"? [1, 2]\n: 3\n", "not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"x" * (2 << 20), "larger than 1048576 bytes"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(content)
    error = error_of("recipe.yaml")
    assert message in error
    assert error.startswith("recipe.yaml")
    assert "\n" not in error
    assert not Path("pwned").exists()


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in error_of(str(tmp_path / "none.yaml"))
    assert "is a directory" in error_of(f"{tmp_path}/").lower()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    path = write_recipe(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)  # root may read any file, so permissions alone would not show it
    assert "cannot be read (Permission denied)" in error_of(path)


def test_an_unknown_shipped_name_lists_the_known_ones() -> None:
    assert error_of("gpt-tinny").startswith(
        "'gpt-tinny' is no shipped recipe and no file; did you mean gpt-tiny? known: gpt-124m, "
    )


def test_base_inherits_from_shipped_recipes_and_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_recipe(tmp_path, "base: gpt-tiny\nmodel:\n  layers: 2\n  kv_heads: 2\n", "middle.yaml")
    path = write_recipe(tmp_path / "sub", "base: ../middle.yaml\nmodel:\n  kv_heads: null\ntrain:\n")
    config, tiny = load_recipe(path), load_recipe("gpt-tiny")
    assert (config.model.layers, config.model.kv_heads, config.model.hidden) == (2, None, tiny.model.hidden)
    assert config.train == tiny.train


def test_a_mistake_names_the_file_that_it_stands_in(tmp_path: Path) -> None:
    write_recipe(tmp_path, SMALL.replace("heads: 12", "heads: twelve"), "below.yaml")
    path = write_recipe(tmp_path, "base: below.yaml\nmodel: {layers: x}\n")
    assert error_of(path).splitlines()[1:] == [
        "  recipe.yaml: model.layers=x is not a whole number; write one such as 4",
        "  below.yaml: model.heads=twelve is not a whole number; write one such as 4",
    ]


STOPS = SMALL.replace("steps: 10", "steps: 10\n  stop_at: 11")


@pytest.mark.parametrize(
    ("below", "recipe", "overrides", "message"),
    [
        (SMALL, "", ["train.micro_batch=5"], "command line: train.global_batch=12 is not divisible by train.micro_"),
        (SMALL, "parallel: {tensor: 8}", [], "recipe.yaml: model.heads=12 is not divisible by parallel.tensor=8"),
        (SMALL + "parallel: {tensor: 8}", "", [], "below.yaml: model.heads=12 is not divisible by parallel.tensor=8"),
        (SMALL, "parallel: {tensor: 4}", ["model.heads=6"], "command line: model.heads=6 is not divisible by paral"),
        # By a key that the line does not name.
        (SMALL, "parallel: {tensor: 3}", ["model.hidden=16", "model.head_dim=4"], "command line: the derived model.f"),
        # A key that the rule reads, of which it is broken nonetheless before.
        (STOPS, "", ["train.global_batch=24"], "below.yaml: train.stop_at=11 is more than train.steps=10"),
        # A wrong value that another one replaces.
        (SMALL + "parallel: {tensor: x}", "parallel: {tensor: 8}", [], "recipe.yaml: model.heads=12 is not divisible"),
        # Broken, kept again, and broken once more.
        (SMALL + "parallel: {tensor: 8}", "parallel: {tensor: 4}", ["parallel.tensor=8"], "command line: model.heads"),
    ],
)  # fmt: skip
def test_a_broken_rule_names_the_source_that_broke_it(
    tmp_path: Path, below: str, recipe: str, overrides: list[str], message: str
) -> None:
    write_recipe(tmp_path, below, "below.yaml")
    assert error_of(write_recipe(tmp_path, f"base: below.yaml\n{recipe}\n"), *overrides).startswith(message)


def test_files_of_one_name_are_put_in_order(tmp_path: Path) -> None:
    for folder in ("a", "a/b"):
        (tmp_path / folder).mkdir()
    write_recipe(tmp_path, SMALL)
    write_recipe(tmp_path / "a", "base: ../recipe.yaml\nparallel: {tensor: 2}\n", "middle.yaml")
    path = write_recipe(tmp_path / "a/b", "base: ../middle.yaml\nparallel: {tensor: 8}\n")
    assert error_of(path).startswith("recipe.yaml: model.heads=12 is not divisible by parallel.tensor=8")


def test_mistakes_of_one_source_are_headed_by_it(tmp_path: Path) -> None:
    error = error_of(write_recipe(tmp_path), "parallel.tensor=8", "train.micro_batch=5")
    assert error.splitlines()[0] == "command line: 2 mistakes"


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path, "base: b.yaml\n", "a.yaml")
    write_recipe(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "base: inherits from itself (a.yaml -> b.yaml -> a.yaml)" in error_of(str(tmp_path / "a.yaml"))
    write_recipe(tmp_path, "base: self.yaml\n", "self.yaml")
    assert "base: inherits from itself (self.yaml -> self.yaml)" in error_of(str(tmp_path / "self.yaml"))


def test_bases_have_a_limit_of_depth(tmp_path: Path) -> None:
    for number in range(20):
        write_recipe(tmp_path, f"base: r{number + 1}.yaml\n", f"r{number}.yaml")
    assert "more than 8 recipes deep" in error_of(str(tmp_path / "r0.yaml"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("3", "base=3 is not a name"),
        ("gone.yaml", "no such file"),
        ("gpt-tinny", "base: 'gpt-tinny' is no shipped recipe and no file; did you mean gpt-tiny?"),
    ],
)
def test_a_wrong_base_is_one_line(tmp_path: Path, base: str, message: str) -> None:
    error = error_of(write_recipe(tmp_path, f"base: {base}\n"))
    assert message in error
    assert "\n" not in error


def test_load_resolved_needs_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml is missing; give the run.dir of a run"):
        load_resolved(tmp_path)
    with pytest.raises(ConfigError, match="no such run"):
        load_resolved(tmp_path / "gone")


def test_aliases_do_not_blow_up_memory_or_the_message(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    error = error_of(write_recipe(tmp_path, SMALL + "\n".join(lines) + "\nseed: *a8\n"))
    assert len(error) < 5000
    assert "is not a whole number" in error_of(write_recipe(tmp_path, SMALL + "seed: &s [*s]\n"))


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20), st.lists(st.floats())
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(key_fields())), values, max_size=4))
def test_a_recipe_with_any_values_loads_or_is_a_config_error(changes: dict[str, object]) -> None:
    recipe = yaml.safe_load(SMALL)
    for path, value in changes.items():
        section, _, key = path.partition(".")
        if key:
            recipe.setdefault(section, {})[key] = value
        else:
            recipe[section] = value
    path = Path(os.environ["PYTEST_TMP_RECIPE"])
    path.write_text(yaml_text.dump(recipe), encoding="utf-8")
    try:
        config = load_recipe(str(path))
    except ConfigError:
        return
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_resolved(path) == config
    assert isinstance(config, RunConfig)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_refused_or_load(content: bytes) -> None:
    path = Path(os.environ["PYTEST_TMP_RECIPE"])
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_recipe(str(path))


@pytest.fixture(autouse=True)
def _recipe_file(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the property tests one file each, which hypothesis reuses between examples."""
    monkeypatch.setenv("PYTEST_TMP_RECIPE", str(tmp_path_factory.mktemp("recipes") / "recipe.yaml"))


def test_the_documentation_has_every_key() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    heads = " ".join(re.findall(r"`[a-z0-9_.=]+`", text)).replace("=", "`=").replace("`", " ").split()
    missing = [key for key in key_fields() if key not in heads and key.rpartition(".")[2] not in heads]
    assert missing == []
