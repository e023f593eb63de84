"""`megalm launch slurm`: a recipe and a request become argument lists of sbatch, which are recorded and submitted.

Names reach Slurm as arguments of their own, never through a shell; what sbatch itself would take for something else
(a leading dash, a % in a path, a line's end) is refused. The record is `records`', the rules of requeueing are
`requeue`'s. No torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megalm.config.run import RunConfig
from megalm.distributed.rendezvous import expand_node_list
from megalm.errors import LaunchError
from megalm.launch import records

SCRIPT = "pretrain.sbatch"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,127}")
_TIME = re.compile(r"[0-9]+(:[0-9]{2}){0,2}|[0-9]+-[0-9]+(:[0-9]{2}){0,2}")
_NOTICE = re.compile(r"^#SBATCH --signal=USR1@(\d+)\s*$", re.MULTILINE)
_JOB_ID = re.compile(r"(\d+)(?:;.*)?")
_LAUNCHER = re.compile(r"SLURM_(?!CONF$|CLUSTERS$).*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)")


@dataclass(frozen=True)
class JobRequest:
    """What is asked of Slurm; None leaves it to the script's #SBATCH lines or to the cluster's default."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    """Minutes, or Slurm's MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    partition: str | None = None
    """One name, or several with commas between."""
    account: str | None = None
    qos: str | None = None
    container: str | None = None
    exclude: str | None = None
    chain: int = 1
    notice_s: int | None = None
    """How long before the limit the ranks are asked to save; None: as the script says."""

    def check(self) -> None:
        """Raise LaunchError for a name, a time or a node list that Slurm could misunderstand."""
        for option, text in (("partition", self.partition), ("account", self.account), ("qos", self.qos)):
            names = [] if text is None else text.split(",") if option == "partition" else [text]
            if not all(_NAME.fullmatch(name) for name in names):
                raise LaunchError(f"--{option}={text!r} is no name; use letters, digits, _ . + @ and - (not first)")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise LaunchError(f"--time={self.time!r} is no time; write minutes, HH:MM:SS or D-HH:MM:SS")
        if self.exclude is not None:
            for _ in expand_node_list(self.exclude):
                pass
        if self.container is not None and (not self.container or self.container[0] == "-" or _odd(self.container)):
            raise LaunchError(f"--container={self.container!r} is no image; give a file or a registry's name of one")


def _odd(text: str) -> bool:
    """Say whether a text holds a control character or half of a surrogate pair."""
    return any(ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000 for letter in text)


def with_defaults(request: JobRequest, script: Path) -> JobRequest:
    """Return the request with nodes and tasks a node filled in from the script's #SBATCH lines.

    The script's notice before the time limit is shortened to a fifth of a requested time that is short.
    """
    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LaunchError(f"{script}: cannot be read ({error}); copy it from the package's megalm/slurm") from error
    values = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node)=(\d+)\s*$", text, re.MULTILINE))
    notice = [int(seconds) for seconds in _NOTICE.findall(text)]
    # A notice that is longer than the job would stop it as soon as it has begun.
    too_long = request.time is not None and notice and notice[-1] > seconds_of(request.time) // 5
    missing = [name for name in ("nodes", "ntasks-per-node") if name not in values]
    if missing and (request.nodes is None or request.gpus_per_node is None):
        raise LaunchError(f"{script}: no line #SBATCH --{missing[0]}=N; give --nodes and --gpus-per-node")
    return replace(
        request,
        nodes=request.nodes or int(values["nodes"]),
        gpus_per_node=request.gpus_per_node or int(values["ntasks-per-node"]),
        notice_s=seconds_of(request.time) // 5 if request.time is not None and too_long else None,
    )


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def world_size(request: JobRequest) -> int:
    """Return the number of ranks of a complete request: one a GPU."""
    assert request.nodes is not None and request.gpus_per_node is not None, request
    return request.nodes * request.gpus_per_node


def run_directory(config: RunConfig) -> Path:
    """Return the absolute run.dir. Raises LaunchError for one that sbatch's --output would change."""
    path = Path(config.run.dir).absolute()
    if _odd(str(path)) or "%" in str(path) or "\\" in str(path):
        raise LaunchError(
            f"run.dir={str(path)!r} holds a control character, % or \\, which sbatch would replace; choose another"
        )
    return path


def sbatch_arguments(request: JobRequest, directory: Path, after: str | None = None) -> list[str]:
    """Return sbatch's argument list for one job of a complete request, whose record lies in `directory`."""
    run_name = re.sub(r"[^A-Za-z0-9_.-]+", "_", directory.parents[1].name)[:64]
    options = {
        "job-name": f"megalm-{run_name}",
        "nodes": request.nodes,
        "ntasks-per-node": request.gpus_per_node,
        "gpus-per-node": request.gpus_per_node,
        "cpus-per-task": request.cpus_per_task,
        "time": request.time,
        "signal": None if request.notice_s is None else f"USR1@{request.notice_s}",
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "exclude": request.exclude,
        "dependency": None if after is None else f"afterany:{after}",
        "output": directory / "job-%j.log",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    script, recipe = directory / SCRIPT, directory / records.RECIPE_FILE
    return ["sbatch", "--parsable", "--export=ALL", *given, str(script), str(recipe)]


def job_environment(environ: Mapping[str, str], request: JobRequest, directory: Path) -> dict[str, str]:
    """Return the environment of sbatch, which the job inherits: without what an allocation around it has left."""
    kept = {name: value for name, value in environ.items() if not _LAUNCHER.fullmatch(name)}
    kept |= {"MEGALM_SLURM": str(directory), "MEGALM_LOGS": str(directory / records.LOGS), "MEGALM_JOB": str(directory)}
    if request.container is not None:
        kept["MEGALM_CONTAINER"] = request.container
    if sys.prefix != sys.base_prefix:
        kept["MEGALM_VENV"] = sys.prefix
    return kept


def require_program(name: str, remedy: str) -> str:
    """Return the path of a program. Raises LaunchError where it is missing."""
    path = shutil.which(name)
    if path is None:
        raise LaunchError(f"{name} is not installed on this machine; {remedy}")
    return path


def launch(config: RunConfig, request: JobRequest, dry_run: bool = False) -> dict[str, Any]:
    """Record and submit a checked recipe; return `job_id`, `job_ids`, `run_dir`, `logs` and `command`.

    `request` must be complete (`with_defaults`). With `dry_run` nothing is written or submitted and the ids are empty.
    Raises LaunchError if sbatch is missing or refuses; what of the chain had been submitted is cancelled then.
    """
    run_dir = run_directory(config)
    directory = records.next_directory(run_dir)
    command = sbatch_arguments(request, directory)
    job_ids: list[str] = []
    if not dry_run:
        require_program("sbatch", "run this on a login node of the cluster, or use megalm train")
        records.snapshot(directory, config, records.script_folder())
        job_ids = _submit(request, directory, command)
    return {
        "job_id": job_ids[0] if job_ids else None,
        "job_ids": job_ids,
        "run_dir": str(run_dir),
        "logs": str(directory / records.LOGS),
        "command": command,
    }


def _submit(request: JobRequest, directory: Path, command: list[str]) -> list[str]:
    """Submit the chain, noting each id at once; without a single one the record is removed again."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = records.JobRecord(str(directory.parents[1]), os.getcwd(), now, command, [])
    records.write_record(directory, record)
    environ = job_environment(os.environ, request, directory)
    for _ in range(request.chain):
        after = record.job_ids[-1] if record.job_ids else None
        arguments = sbatch_arguments(request, directory, after)
        answer = _answer(arguments, environ)
        match = _JOB_ID.fullmatch(answer.stdout.strip())
        if answer.returncode or not match:
            if record.job_ids:
                subprocess.run(["scancel", *reversed(record.job_ids)], check=False)
            else:
                shutil.rmtree(directory)
            raise LaunchError(f"sbatch refused the job: {' '.join((answer.stderr or answer.stdout).split())}")
        record.job_ids.append(match[1])
        records.write_record(directory, record)
    return record.job_ids


def _answer(arguments: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            arguments, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except (OSError, ValueError) as error:
        raise LaunchError(f"sbatch could not be started: {error}") from error
