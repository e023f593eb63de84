"""The command line: what it answers, how fast, and with which exit status."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm import commands
from megalm.cli import build_parser, main, parse
from megalm.config.deepspeed_files import shipped_configs
from megalm.config.load import load_recipe
from megalm.errors import DistributedError, LaunchError
from tests.config.recipes import SMALL, write_recipe


def megalm(*arguments: str, cwd: Path | None = None, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, *flags, "-m", "megalm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_help_answers_at_once() -> None:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        result = megalm("--help")
        times.append(time.perf_counter() - begin)
        assert result.returncode == 0
        assert "quickstart" in result.stdout
    assert min(times) < 0.3, times


def test_help_imports_nothing_heavy() -> None:
    result = megalm("--help", flags=("-X", "importtime"))
    assert result.returncode == 0
    modules = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in modules
    assert not modules & {"torch", "pydantic", "yaml", "numpy", "deepspeed", "rich", "tokenizers", "matplotlib"}


def test_config_commands_import_no_torch() -> None:
    result = megalm("config", "show", "gpt-tiny", flags=("-X", "importtime"))
    assert result.returncode == 0
    modules = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert not modules & {"torch", "numpy", "deepspeed"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("megalm ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "megalm: unknown command 'trian'; did you mean train? known: quickstart, train"),
        (["config", "shwo"], "megalm config: unknown command 'shwo'; did you mean show? known: show, list"),
        (["train"], "megalm train: the following arguments are required: RECIPE; see megalm train --help"),
        (["train", "gpt-tiny", "--nprocs", "3"], "megalm train: unknown option --nprocs; did you mean --nproc?"),
        (["train", "gpt-tiny", "--nproc", "0"], "argument --nproc: '0' is no whole number from 1 on"),
        (["train", "gpt-tiny", "--nproc", "two"], "argument --nproc: 'two' is no whole number from 1 on"),
        (["train", "gpt-tiny", "--fresh=yes"], "--fresh=yes: the option takes no value; leave it out; see"),
        (["generate", "x", "--seed", "9" * 19], "is no whole number from 0 on of at most 18 digits; see"),
        (["evaluate", "x", "--split", "valid"], "unknown --split 'valid'; did you mean validation? known: validation"),
        (["config", "list", "more"], "megalm config list: 'more' is one argument too many"),
        (["generate", "x"], "the following arguments are required: --prompt"),
        (["config", "show", "gpt-tny"], "'gpt-tny' is no shipped recipe and no file; did you mean gpt-tiny?"),
        (["config", "show", "gpt-tiny", "model.laers=1"], "model.laers: unknown key; did you mean model.layers?"),
        (["config", "show", "gpt-tiny", "zero.config=zero2"], "zero2.json:zero_optimization.stage=2 contradicts"),
        (["train", "gpt-tiny", "model.heads=5"], "model.hidden=128 is not divisible by model.heads=5"),
        (["train", "gpt-tiny", "parallel.tensor=4", "--nproc", "2"], "needs 4 ranks, but 2 are started"),
        (["train", "gpt-tiny", "--nproc", "3"], "train.global_batch=8 is not divisible by train.micro_batch=4 x 3"),
        (["train", "gpt-tiny", "data.path=gone"], "gone"),
        (["evaluate", "gone"], "gone: no such run; give the run.dir of a run"),
        (["generate", "gone", "--prompt", "x"], "gone: no such run; give the run.dir of a run"),
        (["checkpoint", "inspect", "gone"], "gone"),
        (["data", "inspect", "gone"], "gone"),
        (["tokenizer", "inspect", "gone"], "gone"),
        (["data", "prepare", "--out", "x"], "no text was given"),
        (["data", "prepare", "--corpus", "buildin", "--out", "x"], "did you mean builtin?"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_on_stderr_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def functions(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of the functions of a parser and of all commands below it."""
    found = [parser.get_default("function")] if parser.get_default("function") else []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [name for below in action.choices.values() for name in functions(below)]
    return found


def test_every_command_has_its_function() -> None:
    names = functions(build_parser())
    assert "train" in names and "launch.commands.launch_slurm" in names
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"megalm.{module or 'commands'}"), function))


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "prepare" in capsys.readouterr().err


def test_options_may_stand_between_the_overrides() -> None:
    parsed = parse(["--debug", "train", "gpt-tiny", "a=1", "--nproc", "2", "b=2", "--fresh", "c=3"])
    assert (parsed.recipe, parsed.nproc, parsed.fresh, parsed.debug) == ("gpt-tiny", 2, True, True)
    assert parsed.overrides == ["a=1", "b=2", "c=3"]
    assert parse(["train", "gpt-tiny", "--debug"]).debug
    assert not parse(["train", "gpt-tiny"]).debug


def test_config_show_answers_in_yaml_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["config", "show", recipe, "model.layers=2"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_recipe(str(shown)) == load_recipe(recipe, ["model.layers=2"])
    assert main(["config", "show", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["layers"] == 4
    assert main(["config", "show", recipe, "--deepspeed"]) == 0
    assert json.loads(capsys.readouterr().out)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ("gpt-tiny", "853,120 parameters, and 128 for each token of the tokenizer's vocabulary"),
        ("gpt-124m", "124,439,808 parameters"),
        ("gpt-1b", "1,315,723,264 parameters"),
        ("llama-8b", "8,030,261,248 parameters"),
        ("gpt-22b", "22,074,273,792 parameters"),
        ("gpt-175b", "174,604,259,328 parameters"),
        ("llama-405b", "405,853,388,800 parameters"),
    ],
)
def test_config_show_says_how_large_the_model_is(recipe: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", recipe]) == 0
    assert capsys.readouterr().out.startswith(f"# {size}\n")


def test_config_show_says_what_muon_updates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "gpt-tiny", "optim.kind=muon"]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert second == "# Muon updates 851,968 parameters, of hidden matrices; AdamW everything else"
    frozen = "optim.rules=[{match: 'blocks.[0-2].*', freeze: true}, {match: '*.qkv.*', muon: false}]"
    assert main(["config", "show", "gpt-tiny", "optim.kind=muon", frozen]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    left = (851_968 - 4 * 3 * 128 * 128) // 4
    assert second == f"# Muon updates {left:,} parameters, of hidden matrices; AdamW everything else that is not frozen"


def test_config_list_names_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "gpt-tiny" in listed["recipes"]
    assert listed["deepspeed_configs"].keys() == shipped_configs().keys()
    assert main(["config", "list"]) == 0
    shown = capsys.readouterr().out
    assert "GPT-3, 175 billion parameters" in shown and "ZeRO 3 on several nodes of 8 GPUs" in shown


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DistributedError("rank 1 is gone"), 1, "error: rank 1 is gone\n"),
        (LaunchError("RANK is missing"), 2, "error: RANK is missing\n"),
        (RuntimeError("a\nbug"), 1, "error: RuntimeError: a bug; --debug shows where\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_have_their_status_and_a_traceback_only_with_debug(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(commands, "config_list", fail)
    assert main(["config", "list"]) == status
    assert capsys.readouterr().err == message
    for arguments in (["--debug", "config", "list"], ["config", "list", "--debug"]):
        assert main(arguments) == status
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert "Traceback (most recent call last)" in shown


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m megalm config show gpt-tiny | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("0\n", "")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, Path | None]]:
    """Give data that always fits, and record the workers that would be started instead of starting them."""
    calls: list[tuple[list[str], int, Path | None]] = []

    def run_workers(command: list[str], nproc: int, log_dir: Path | None, held: object = ()) -> int:
        calls.append((command, nproc, log_dir))
        return 7

    monkeypatch.setitem(sys.modules, "megalm.launch.local", SimpleNamespace(run_workers=run_workers))
    data = SimpleNamespace(
        fingerprint="d" * 64, tokenizer_fingerprint="t" * 64, windows=lambda sequence, rows: range(100)
    )
    monkeypatch.setattr(commands, "check_data", lambda config: data)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, SMALL + "run: {dir: out}\n")
    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    return calls


def test_train_starts_as_few_workers_as_the_layout_needs(started: list[Any]) -> None:
    overrides = ["parallel.tensor=2", "parallel.pipeline=2"]
    assert main(["train", "recipe.yaml", *overrides, "--fresh", "--debug"]) == 7
    expected = [sys.executable, "-m", "megalm", "train", "recipe.yaml", *overrides, "--fresh", "--debug"]
    assert started == [(expected, 4, Path("out/logs"))]


def test_nproc_adds_data_parallel_ranks(started: list[Any]) -> None:
    assert main(["train", "recipe.yaml", "--nproc", "6", "parallel.tensor=2"]) == 7
    assert started[0][1] == 6


def test_a_prompt_reaches_the_workers_whatever_it_looks_like(started: list[Any], tmp_path: Path) -> None:
    arguments = ["generate", "recipe.yaml", "parallel.tensor=2", "--prompt=--a b=c", "--top-k", "5"]
    (tmp_path / "recipe.yaml").rename(tmp_path / "config.yaml")
    arguments[1] = str(tmp_path)
    assert main(arguments) == 7
    again = parse(started[0][0][3:])
    assert (again.prompt, again.top_k, again.overrides) == ("--a b=c", 5, ["parallel.tensor=2"])


def test_under_a_launcher_no_workers_are_started(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    pretrain = SimpleNamespace(train=lambda config, fresh, *rest: trained.append((config.run.dir, fresh)))
    monkeypatch.setitem(sys.modules, "megalm.train.pretrain", pretrain)
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "recipe.yaml", "parallel.tensor=2"]) == 0
    assert (trained, started) == ([("out", False)], [])
    assert main(["train", "recipe.yaml", "parallel.tensor=2", "--nproc", "4"]) == 2
    assert main(["train", "recipe.yaml", "parallel.tensor=4"]) == 2
    assert len(trained) == 1


@pytest.mark.parametrize(("attempt", "restart"), [(None, False), ("0", False), ("1", True)])
def test_a_job_that_is_started_again_does_not_begin_afresh(
    monkeypatch: pytest.MonkeyPatch, attempt: str | None, restart: bool
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    if attempt is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    assert commands._is_restart() is restart
