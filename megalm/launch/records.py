"""The record of a submission: what was sent to Slurm, from which code, with which recipe, under which job ids.

Owns the directory RUN/jobs/0001 (0002, ...) and its files:

    job.json       job ids, the command, where and when it was submitted
    recipe.yaml    the resolved recipe, which is what the job trains
    code.json      git revision or version, Python, every installed package
    code.diff      what the working tree had changed since that revision, where it had
    *.sbatch *.sh  the scripts as they were
    logs/          a log a rank, attempts.json

No torch.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from megalm.config.load import dump_yaml
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.files import write_durably
from megalm.version import __version__

JOBS, LOGS = "jobs", "logs"
RECORD_FILE, RECIPE_FILE, CODE_FILE, DIFF_FILE = "job.json", "recipe.yaml", "code.json", "code.diff"
ATTEMPTS_FILE = "attempts.json"
FORMAT = "megalm-job-1"
_MOST_DIFF_BYTES = 16 << 20


@dataclass
class JobRecord:
    """What `job.json` holds; `job_ids` in the order of the chain."""

    run_dir: str
    submit_dir: str
    submitted: str
    """Time in UTC, ISO 8601."""
    command: list[str]
    """The argument list of the first sbatch."""
    job_ids: list[str]
    preflight_job: str | None = None
    """The job that examines nodes before the first of these."""
    excluded: str | None = None
    """The nodes that the jobs stay away from, as Slurm writes them."""
    format: str = FORMAT

    def all_ids(self) -> list[str]:
        """Return the ids of all jobs, in the order in which they run."""
        return [*([self.preflight_job] if self.preflight_job else []), *self.job_ids]


def job_directories(run_dir: Path) -> list[Path]:
    """Return the directories of a run's submissions, the oldest first."""
    jobs = run_dir / JOBS
    found = [path for path in jobs.iterdir() if path.name.isdecimal() and path.is_dir()] if jobs.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def next_directory(run_dir: Path) -> Path:
    """Return the directory that the next submission of this run gets; nothing is made."""
    before = job_directories(run_dir)
    return run_dir / JOBS / f"{int(before[-1].name) + 1 if before else 1:04d}"


def read_record(directory: Path) -> JobRecord:
    """Return a submission's record. Raises ConfigError for a missing or damaged one."""
    path = directory / RECORD_FILE
    try:
        record = JobRecord(**json.loads(path.read_text(encoding="utf-8")))
        if record.format != FORMAT or not all(isinstance(job, str) for job in record.job_ids):
            raise ValueError("not a record of this version")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no record of a submitted job ({' '.join(str(error).split())})") from error
    return record


def write_record(directory: Path, record: JobRecord) -> None:
    """Write `job.json`, whole or not at all."""
    write_durably(directory / RECORD_FILE, (json.dumps(asdict(record), indent=1) + "\n").encode())


def successors(job_ids: Sequence[str], job: str) -> list[str]:
    """Return the jobs of a chain that follow `job`; none for one that is not of this chain."""
    return list(job_ids[job_ids.index(job) + 1 :]) if job in job_ids else []


def script_folder() -> Path:
    """Return the folder of the batch scripts: `slurm/` here if it holds them, as edited; else those of the package."""
    here = Path("slurm").absolute()
    return here if (here / "pretrain.sbatch").is_file() else Path(str(resources.files("megalm.slurm")))


def snapshot(directory: Path, config: RunConfig, scripts: Path) -> None:
    """Make a submission's directory with its scripts, recipe and code. Raises ConfigError if it cannot be made."""
    try:
        (directory / LOGS).mkdir(parents=True)
        for path in sorted(scripts.iterdir()):
            if path.suffix in (".sbatch", ".sh"):
                shutil.copyfile(path, directory / path.name)
        (directory / RECIPE_FILE).write_text(dump_yaml(config), encoding="utf-8")
        code, diff = code_identity()
        (directory / CODE_FILE).write_text(json.dumps(code, indent=1) + "\n", encoding="utf-8")
        if diff:
            (directory / DIFF_FILE).write_bytes(diff)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be made ({error.strerror}); choose another run.dir") from error


def remove(directory: Path) -> None:
    """Remove a submission's directory, and those around it that were made for it: what is empty then."""
    shutil.rmtree(directory)
    for path in (directory.parent, directory.parent.parent):
        if any(path.iterdir()):
            return
        path.rmdir()


def code_identity() -> tuple[dict[str, Any], bytes]:
    """Return version, git revision (None: no clone), Python and packages; and the diff against the revision."""
    root = Path(__file__).resolve().parents[2]
    code: dict[str, Any] = {"megalm": __version__, "revision": None, "python": platform.python_version()}
    diff = b""
    if (root / ".git").exists() and (revision := _git(root, "rev-parse", "HEAD")):
        changed = _git(root, "status", "--porcelain") or b""
        diff = (_git(root, "diff", "HEAD", "--binary") or b"")[:_MOST_DIFF_BYTES]
        code |= {"revision": revision.decode().strip(), "changed": changed.decode(errors="replace").splitlines()}
    packages = {found.metadata["Name"]: found.version for found in metadata.distributions() if found.metadata["Name"]}
    code["packages"] = dict(sorted(packages.items(), key=lambda item: item[0].lower()))
    return code, diff


def _git(root: Path, *arguments: str) -> bytes | None:
    """Return what git answers, None where it is missing or refuses."""
    try:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
