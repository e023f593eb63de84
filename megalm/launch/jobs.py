"""`megalm launch status`, `cancel` and `logs`: a run's submitted jobs, from their records, squeue and sacct.

No torch.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError, LaunchError
from megalm.launch import records
from megalm.launch.requeue import first_error, newest_step, rank_logs, read_attempts
from megalm.launch.slurm import require_program

logger = logging.getLogger(__name__)

ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT", "UNKNOWN"),
)
_REMEDY = "run this on a login node of the cluster"


def status(run: str) -> dict[str, Any]:
    """Return the run's newest step and the state of each of its jobs. Raises ConfigError for a run without jobs."""
    run_dir, directories = _find(run)
    jobs = []
    states = job_states()
    for directory in directories:
        attempts = read_attempts(directory / records.LOGS)
        try:
            job_ids = records.read_record(directory).all_ids()
        except ConfigError as error:  # of a submission that was cut off; the others' jobs are there all the same
            logger.warning("%s", error)
            continue
        for job_id in job_ids:
            state = states.get(job_id) or accounted(job_id)
            failures = attempts.failures if attempts else 0
            jobs.append({"job_id": job_id, **state, "failures": failures, "record": str(directory)})
    return {"run_dir": str(run_dir), "step": newest_step(run_dir), "jobs": jobs}


def refuse_living(run_dir: Path) -> None:
    """Raise ConfigError if a submitted job of this run is not over: it holds the run's directory."""
    if not records.job_directories(run_dir) or shutil.which("squeue") is None:
        return
    living = [job["job_id"] for job in status(str(run_dir))["jobs"] if job["state"] not in ENDED]
    if living:
        raise ConfigError(
            f"run.dir={run_dir}: job {', '.join(living)} trains it or is to; wait, use --chain next time, or: "
            f"megalm launch cancel {run_dir}"
        )


def cancel(run: str) -> dict[str, Any]:
    """Cancel all jobs of the run that have not ended, the last of a chain first, so that none starts meanwhile."""
    require_program("scancel", _REMEDY)
    found = status(run)
    living = [job["job_id"] for job in reversed(found["jobs"]) if job["state"] not in ENDED]
    if living:
        answer = subprocess.run(["scancel", *living], capture_output=True, text=True, check=False)
        if answer.returncode:
            raise LaunchError(f"scancel refused: {' '.join(answer.stderr.split())}")
    return {"run_dir": found["run_dir"], "cancelled": living}


def logs(run: str) -> dict[str, Any]:
    """Return the paths of the newest submission's logs, and the first error in them since its last start."""
    run_dir, directories = _find(run)
    directory = directories[-1]
    folder = directory / records.LOGS
    attempts = read_attempts(folder)
    error = first_error(folder, attempts.log_bytes if attempts else {})
    return {
        "run_dir": str(run_dir),
        "logs": str(folder),
        "job_logs": [str(path) for path in sorted(directory.glob("job-*.log"))],
        "rank_logs": [str(path) for path in sorted(rank_logs(folder), key=lambda path: (len(path.name), path.name))],
        "first_error": None if error.startswith("no rank says why") else error,
    }


def _find(run: str) -> tuple[Path, list[Path]]:
    run_dir = Path(run).absolute()
    directories = records.job_directories(run_dir)
    if not directories:
        raise ConfigError(f"{run}: no submitted jobs; give the run.dir of a run that megalm launch slurm has started")
    return run_dir, directories


def job_states() -> dict[str, dict[str, Any]]:
    """Return what squeue still knows of this user's jobs, ended ones too for some minutes, by job id.

    Raises LaunchError where squeue is missing or does not answer.
    """
    require_program("squeue", _REMEDY)
    command = ["squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%r|%M|%N"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise LaunchError(f"squeue does not answer: {' '.join(answer.stderr.split())}")
    found = {}
    for line in answer.stdout.splitlines():
        job_id, state, reason, elapsed, nodes = line.split("|", 4)
        found[job_id] = {"state": state, "reason": reason, "elapsed": elapsed, "nodes": nodes}
    return found


def accounted(job_id: str) -> dict[str, Any]:
    """Return what the accounting knows of a job that has left the queue; UNKNOWN on a cluster without accounting."""
    unknown = {"state": "UNKNOWN", "reason": "ended, and no accounting tells how", "elapsed": "", "nodes": ""}
    if shutil.which("sacct") is None:
        return unknown
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}"]
    command.append("--format=State,ExitCode,Elapsed,NodeList")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in answer.stdout.splitlines() if line.count("|") == 3]
    if answer.returncode or not lines:
        return unknown
    state, code, elapsed, nodes = lines[-1].split("|")
    return {"state": state.split()[0], "reason": f"exit status {code}", "elapsed": elapsed, "nodes": nodes}
