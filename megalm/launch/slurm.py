"""Requests to Slurm become argument lists of sbatch, which are submitted; `megalm launch slurm` records them too.

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

SCRIPT, PREFLIGHT_SCRIPT = "pretrain.sbatch", "preflight.sbatch"
PREFLIGHT = "preflight"
"""Where in a submission's directory the logs of its preflight lie."""
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
    preflight: bool = False
    """Examine the nodes by a job of their own, and keep the others away from those that fail."""

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
    limit_s = seconds_of(request.time) if request.time is not None else 0  # 0 is no limit to Slurm
    too_long = limit_s > 0 and notice and notice[-1] > limit_s // 5
    asked = {"nodes": request.nodes, "ntasks-per-node": request.gpus_per_node}
    missing = [name for name, count in asked.items() if count is None and name not in values]
    if missing:
        raise LaunchError(f"{script}: no line #SBATCH --{missing[0]}=N; give --nodes and --gpus-per-node")
    return replace(
        request,
        nodes=request.nodes or int(values["nodes"]),
        gpus_per_node=request.gpus_per_node or int(values["ntasks-per-node"]),
        notice_s=limit_s // 5 if too_long else None,
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


def log_folder(name: str, path: str | Path) -> Path:
    """Return the absolute path of the option `name`. Raises LaunchError for one that sbatch's --output would change."""
    folder = Path(path).absolute()
    if _odd(str(folder)) or "%" in str(folder) or "\\" in str(folder):
        raise LaunchError(
            f"{name}={str(folder)!r} holds a control character, % or \\, which sbatch would replace; choose another"
        )
    return folder


def sbatch_arguments(
    request: JobRequest, name: str, logs: Path, command: Sequence[str | Path], after: str | None = None
) -> list[str]:
    """Return sbatch's argument list for one job: `command`, a script and its arguments, with its log in `logs`.

    `name` may be any text; `after` is the job that must have ended, however it did.
    """
    options = {
        "job-name": f"megalm-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:64]}",
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
        "output": logs / "job-%j.log",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", "--export=ALL", *given, *map(str, command)]


def job_environment(
    environ: Mapping[str, str], request: JobRequest, scripts: Path, logs: Path, record: Path | None = None
) -> dict[str, str]:
    """Return the environment of sbatch, which the job inherits: without what an allocation around it has left.

    `scripts` holds common.sh, `logs` gets a log a rank, `record` is the record of a chain (None: the job stands alone).
    """
    kept = {name: value for name, value in environ.items() if not _LAUNCHER.fullmatch(name)}
    kept |= {"MEGALM_SLURM": str(scripts), "MEGALM_LOGS": str(logs), "MEGALM_JOB": str(record or "")}
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
    """Record and submit a checked recipe; return `job_id`, `job_ids`, `run_dir`, `logs`, `commands` and `script`.

    `commands` holds sbatch's arguments for each job, `script` the path of what the jobs run. `request` must be complete
    (`with_defaults`). With `dry_run` nothing is written or submitted, there are no ids, and in the commands JOB1 stands
    for the first job's id. Raises LaunchError if sbatch is missing or refuses; what of the chain had been submitted is
    cancelled then.
    """
    run_dir = log_folder("run.dir", config.run.dir)
    directory = records.next_directory(run_dir)
    environ = {**_mounts(request, [Path.cwd(), run_dir, Path(config.data.path).absolute()]), **os.environ}
    record: records.JobRecord | None = None
    if not dry_run:
        for program in ("sbatch", *(["scontrol"] if request.preflight else [])):
            require_program(program, "run this on a login node of the cluster, or use megalm train")
        records.snapshot(directory, config, records.script_folder())
        record = _submit(request, directory, environ)
    ids = record.all_ids() if record else [f"JOB{number + 1}" for number in range(request.chain + request.preflight)]
    return {
        "job_id": record.job_ids[0] if record else None,
        "job_ids": record.job_ids if record else [],
        "run_dir": str(run_dir),
        "logs": str(directory / records.LOGS),
        "commands": [_arguments(request, directory, ids[:number]) for number in range(len(ids))],
        "script": str((directory if record else records.script_folder()) / SCRIPT),
    }


def _arguments(request: JobRequest, directory: Path, before: Sequence[str]) -> list[str]:
    """Return sbatch's argument list for the job of a submission that comes after those of the ids `before`."""
    after = before[-1] if before else None
    if request.preflight and not before:
        command = [directory / PREFLIGHT_SCRIPT, directory / records.RECIPE_FILE]
        short = replace(request, time=None, notice_s=None)
        arguments = sbatch_arguments(short, f"preflight-{directory.parents[1].name}", directory, command)
        return [*arguments[:2], "--hold", *arguments[2:]]  # until all that it may have to change is there
    command = [directory / SCRIPT, directory / records.RECIPE_FILE]
    return sbatch_arguments(request, directory.parents[1].name, directory, command, after)


def _mounts(request: JobRequest, wanted: Sequence[Path]) -> dict[str, str]:
    """Return what tells a container to see the directories, and this program's; nothing without a container.

    Raises LaunchError for a path that the option of pyxis would cut.
    """
    if request.container is None:
        return {}
    paths = dict.fromkeys(str(path) for path in (*wanted, Path(sys.prefix), records.script_folder()))
    for path in paths:
        if "," in path or ":" in path:
            raise LaunchError(f"--container: {path} holds a comma or colon, which divide mounts; choose another path")
    return {"MEGALM_MOUNTS": ",".join(f"{path}:{path}" for path in paths)}


def _submit(request: JobRequest, directory: Path, environ: Mapping[str, str]) -> records.JobRecord:
    """Submit all jobs, noting each id at once; without a single one of the chain the record is removed again."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = _arguments(replace(request, preflight=False), directory, [])
    record = records.JobRecord(str(directory.parents[1]), os.getcwd(), now, command, [], excluded=request.exclude)
    records.write_record(directory, record)
    own = job_environment(environ, request, directory, directory / records.LOGS, directory)
    try:
        if request.preflight:
            to_preflight = job_environment(environ, request, directory, directory / PREFLIGHT)
            to_preflight["MEGALM_EXCLUDE"] = str(directory)
            record.preflight_job = submit(_arguments(request, directory, []), to_preflight)
            records.write_record(directory, record)
        for _ in range(request.chain):
            record.job_ids.append(submit(_arguments(request, directory, record.all_ids()), own))
            records.write_record(directory, record)
        if record.preflight_job:
            _release(record.preflight_job)
    except LaunchError:
        if record.all_ids():
            withdraw(record.all_ids())
        if not record.job_ids:
            records.remove(directory)
        raise
    return record


def _release(job: str) -> None:
    """Let a held job start. Raises LaunchError where Slurm refuses."""
    asked = subprocess.run(["scontrol", "release", job], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise LaunchError(f"scontrol release {job} refused: {' '.join(asked.stderr.split())}; nothing is submitted")


def submit(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Run sbatch and return the job's id. Raises LaunchError if it is missing or refuses."""
    try:
        answer = subprocess.run(
            arguments, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except (OSError, ValueError) as error:
        raise LaunchError(f"sbatch could not be started: {error}") from error
    match = _JOB_ID.fullmatch(answer.stdout.strip())
    if answer.returncode or not match:
        raise LaunchError(f"sbatch refused the job: {' '.join((answer.stderr or answer.stdout).split())}")
    return match[1]


def withdraw(job_ids: Sequence[str]) -> None:
    """Cancel jobs just submitted, the last one first, so that none starts meanwhile."""
    subprocess.run(["scancel", *reversed(job_ids)], check=False)
