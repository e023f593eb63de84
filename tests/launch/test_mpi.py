"""The argument list of mpirun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megalm.cli import main
from megalm.errors import LaunchError
from megalm.launch.mpi import mpirun_arguments
from tests.end_to_end.workplace import make_workplace
from tests.launch.hostile_names import HOSTILE


def test_the_argument_list() -> None:
    program = [sys.executable, "-m", "megalm", "train", "gpt-tiny", "train.steps=3"]
    assert mpirun_arguments("gpt-tiny", ["train.steps=3"], 4, None) == ["mpirun", "-n", "4", *program]
    assert mpirun_arguments("gpt-tiny", ["train.steps=3"], 4, "a:2,b.c:2")[3:5] == ["-host", "a:2,b.c:2"]


@pytest.mark.parametrize("hosts", ["", "a:", "a:0", "a:x", "a,,b", "-x", "a b", *HOSTILE])
def test_hosts_that_are_none_are_refused(hosts: str) -> None:
    with pytest.raises(LaunchError):
        mpirun_arguments("gpt-tiny", [], 2, hosts)


def test_without_mpirun_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "mpi", "recipe.yaml", "--nproc=3", "parallel.tensor=2"]) == 2
    assert "parallel.tensor" in capsys.readouterr().err
    assert main(["launch", "mpi", "recipe.yaml", "--nproc=2", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("mpirun -n 2 ")
    assert main(["launch", "mpi", "recipe.yaml", "--nproc=2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: mpirun is not installed") and said.count("\n") == 1
