"""`megalm doctor` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.errors import AbsentRanks, ConfigError
from megalm.preflight import command
from megalm.preflight.node import node_name

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def doctor(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `megalm doctor` in a process of its own, without what the test's launcher left."""
    clean = {name: value for name, value in os.environ.items() if name not in (*LAUNCHERS, "TRITON_INTERPRET")}
    words = [sys.executable, "-m", "megalm", "doctor", *arguments]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env={**clean, **environ}
    )


def test_one_machine_as_json(tmp_path: Path) -> None:
    result = doctor("--json", cwd=tmp_path)
    found = json.loads(result.stdout)
    assert found["node"] == node_name()
    levels = [finding["level"] for finding in found["findings"]]
    assert result.returncode == int("fail" in levels), result.stdout
    checks = {finding["check"] for finding in found["findings"]}
    assert {"python", "packages", "torch", "apex", "product", "limits", "shm", "disk", "clock"} <= checks
    assert all(finding["remedy"] for finding in found["findings"] if finding["level"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_torch_a_foreign_apex_and_a_partial_environment_are_findings(tmp_path: Path) -> None:
    for name, source in (("torch", "raise ImportError('libcudart.so.13: cannot open')"), ("apex", "raise SystemExit")):
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text(source)
    result = doctor("gpt-tiny", "run.dir=runs/x", cwd=tmp_path, PYTHONPATH=str(tmp_path / "path"), RANK="0")
    assert result.returncode == 1
    assert result.stderr == ""
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "torch fail torch does not load: ImportError: libcudart.so.13: cannot open" in lines
    assert any(line.startswith("apex warn") and "another program" in line for line in lines)
    assert "environment fail RANK set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing" in lines
    assert "-> pip uninstall apex" in lines


def test_local_workers_are_compared(tmp_path: Path) -> None:
    result = doctor(
        "--cluster", "--nproc", "2", "--json", "--exclude-file", "bad-nodes", cwd=tmp_path, SLURMD_NODENAME="node7"
    )
    found = json.loads(result.stdout)
    assert [(node["node"], node["ranks"]) for node in found["nodes"]] == [("node7", [0, 1])]
    assert result.returncode == int(found["level"] == "fail"), result.stdout
    assert found["all_reduce_bytes_per_s"]
    assert (tmp_path / "bad-nodes").read_text() == "".join(f"{name}\n" for name in found["failed"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nproc", "2"), "--nproc belongs to `megalm doctor --cluster`"),
        (("--exclude-file", "x"), "--exclude-file belongs to"),
        (("run.dir=x",), "run.dir=x changes no recipe; give a RECIPE first"),
        (("no-such-recipe",), "no-such-recipe"),
        (("--cluster", "--exclude-file", "no/such/folder/x"), "cannot be written (No such file or directory)"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = doctor(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_nodes_that_did_not_start_are_excluded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "rank_nodes", lambda environ: ["node1", "node1", "node2", "node2", "node5", "node5"])

    def absent(*arguments: object) -> int:
        raise AbsentRanks("3 of 6 processes arrived", (2, 4, 5))

    monkeypatch.setattr(command, "_in_world", absent)
    file = tmp_path / "bad"
    with pytest.raises(AbsentRanks):
        command.examine_cluster(tmp_path, 1, file, 1.0, as_json=False)
    assert file.read_text() == "node2\nnode5\n"
    assert capsys.readouterr().out == "--exclude=node2,node5\n"


def test_an_exclude_file_that_cannot_be_written_fails_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--exclude-file="):
        command._write_names(tmp_path / "no/file", [])
