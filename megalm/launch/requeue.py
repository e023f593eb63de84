"""What becomes of a Slurm job whose ranks have ended: done, requeued, left to the next job of its chain, or stopped.

    python -m megalm.launch.requeue begin --logs DIR -- RECIPE [key=value ...]
    python -m megalm.launch.requeue end --logs DIR --job ID --status STATUS [--record DIR]

`slurm/common.sh` calls the first before the ranks start and the second with srun's exit status. Owns the rules
(`decide`, which knows no Slurm) and `attempts.json` beside the logs: how many steps the run had ever done, how many
starts in a row have done none that was new, and where each rank's log ended before this start. No torch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megalm.checkpoint.names import CHECKPOINTS, find_checkpoints, step_of
from megalm.errors import CheckpointError, CorruptionError, Diverged, Interrupted, MegalmError, UserError
from megalm.files import write_durably
from megalm.launch.records import ATTEMPTS_FILE, read_record, successors

MOST_FAILURES = 3
"""Starts in a row without a new step, after which a job is not requeued any more."""
SAVED, MISTAKE = Interrupted.exit_status, UserError.exit_status
FINAL = (CorruptionError.exit_status, Diverged.exit_status)
_TAIL_BYTES = 1 << 16
_ENDED = re.compile(rb"^rank (\d+) on (\S+) ended with status (\d+)(?: after (SIG\w+))?(?: at \S+)?$", re.MULTILINE)
_ERROR = re.compile(rb"^(?:\[rank \d+\] )?(?:error: |[\w.]*(?:Error|Exception)\b|Fatal |.*\berror: ).*$", re.MULTILINE)
_TRIES, _PAUSE_S = 5, 10.0


@dataclass(frozen=True)
class Decision:
    """What to do with the job, why, and the exit status of its script."""

    action: str
    """"done", "requeue", "next" (the chain's next job goes on) or "stop"."""
    reason: str
    status: int


@dataclass
class Attempts:
    """What the starts of a job, or of a chain of jobs, have come to so far."""

    run_dir: str
    steps_done: int
    """The most that ever stood in the run; those that it took back itself, by a rollback, count on."""
    failures: int = 0
    log_bytes: dict[str, int] = field(default_factory=dict)
    """Size of each rank's log before this start."""


@dataclass(frozen=True)
class RankEnd:
    """The line that a rank leaves in its log when its command has ended."""

    rank: int
    node: str
    status: int
    signal: str


def decide(
    status: int,
    step: int,
    attempts: Attempts | None,
    *,
    taken_back: int,
    signal: str,
    in_chain: bool,
    has_next: bool,
    error: str,
) -> Decision:
    """Return what becomes of a job that ended with `status` (0, 2, 75 or a failure's) and has reached `step`.

    `attempts` is brought up to date; None: there is no run to go on with, so only a job that a SIGTERM ended (a
    pre-emption) is repeated. `taken_back` counts the steps that rollbacks undid: they were progress too. `signal` is
    the one that asked to stop: a chain's next job takes over at the time limit (SIGUSR1), whereas a pre-empted job
    keeps its place in the chain and comes back itself.
    """
    if status == 0:
        return Decision("done", "done", 0)
    if status == MISTAKE:
        return Decision("stop", f"the input is wrong, so no further start can help: {error}", status)
    if status in FINAL:
        return Decision("stop", f"failed with status {status}, which nobody but you can mend: {error}", status)
    if attempts is None:
        if signal == "SIGTERM":
            return Decision("requeue", "ended by SIGTERM", status)
        return Decision("stop", f"failed with status {status}: {error}", status)
    progress = step + taken_back > attempts.steps_done
    attempts.steps_done = max(step + taken_back, attempts.steps_done)
    if status == SAVED:
        attempts.failures = 0
        if not in_chain or signal == "SIGTERM":
            return Decision("requeue", f"saved at step {step}", status)
        if has_next:
            return Decision("next", f"saved at step {step}; the next job of the chain goes on", status)
        return Decision("stop", f"saved at step {step}; this was the last job of the chain, launch again", status)
    attempts.failures = 0 if progress else attempts.failures + 1
    if attempts.failures >= MOST_FAILURES:
        reason = f"{attempts.failures} starts in a row did no new step, the last one is {step}: {error}"
        return Decision("stop", f"failed with status {status}; {reason}", status)
    without = f", start {attempts.failures} of {MOST_FAILURES} without a new step" if attempts.failures else ""
    return Decision("requeue", f"failed with status {status} at step {step}{without}: {error}", status)


def newest_step(run_dir: Path) -> int:
    """Return the last step that a run has logged or saved, 0 where there is none."""
    steps = [0]
    with suppress(CheckpointError):  # a directory that cannot be read is the run's own error to report
        steps += map(step_of, find_checkpoints(run_dir / CHECKPOINTS))
    for line in _tail(run_dir / "metrics.jsonl").splitlines():
        match_line = re.match(rb'\{"step": (\d{1,18})[,}]', line)
        steps += [int(match_line[1])] if match_line else []
    return max(steps)


def steps_taken_back(run_dir: Path) -> int:
    """Return how many steps a run has undone by going back to earlier checkpoints, all times together."""
    went_back = re.compile(rb'\{"step": (\d{1,18}), "event": "went back", "from_step": (\d{1,18})[,}]')
    try:
        with (run_dir / "metrics.jsonl").open("rb") as lines:
            found = [match for line in lines if (match := went_back.match(line))]
    except OSError:
        return 0
    return sum(int(match[2]) - int(match[1]) for match in found)


def _tail(path: Path, start: int = 0) -> bytes:
    """Return the end of a file, at most 64 KiB of what lies behind `start`; nothing where it cannot be read."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(start, size - _TAIL_BYTES) if start <= size else 0)
            return stream.read(_TAIL_BYTES)
    except OSError:
        return b""


def rank_logs(logs: Path) -> list[Path]:
    """Return the ranks' logs in the order in which they were last written to: who failed first comes first."""
    found = [path for path in logs.glob("rank-*.log") if path.is_file()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def rank_ends(logs: Path, before: dict[str, int]) -> list[RankEnd]:
    """Return how each rank of this start ended, as far as it could still say so; `before`: `Attempts.log_bytes`."""
    ends = []
    for path in rank_logs(logs):
        found = _ENDED.findall(_tail(path, before.get(path.name, 0)))
        ends += [RankEnd(int(r), node.decode(), int(s), signal.decode()) for r, node, s, signal in found[-1:]]
    return ends


def first_error(logs: Path, before: dict[str, int]) -> str:
    """Return the first line that looks like an error in the ranks' logs of this start, with the log's name."""
    return error_line(rank_logs(logs), before) or f"no rank says why; see {logs}"


def error_line(paths: Sequence[Path], before: Mapping[str, int]) -> str | None:
    """Return the first line that looks like an error, with its file's path; None where none does.

    Only what lies behind a file's size in `before` (by name) is looked at.
    """
    for path in paths:
        match = _ERROR.search(_tail(path, before.get(path.name, 0)))
        if match:
            return f"{match[0].decode(errors='replace').strip()[:500]} ({path})"
    return None


def common_status(srun_status: int, ends: Sequence[RankEnd]) -> int:
    """Return one status for all ranks: 2 and those that are final before all else, 75 if they saved and none failed.

    srun gives the largest of all, and those that it killed because a peer had ended count as 137. A rank that saved
    ends with 0 towards srun.
    """
    said = {end.status for end in ends}
    for status in (MISTAKE, *FINAL):
        if status in said:
            return status
    if srun_status == 0:
        return SAVED if SAVED in said else 0
    return 1 if srun_status in (MISTAKE, SAVED) else srun_status


def stop_signal(ends: Sequence[RankEnd]) -> str:
    """Return the signal by which Slurm asked the ranks to stop, "" if none did.

    Where a rank has failed without one, what its peers got came from srun, which ends them: no pre-emption.
    """
    if any(end.status not in (0, SAVED) and not end.signal for end in ends):
        return ""
    signals = [end.signal for end in ends if end.signal]
    return "SIGTERM" if "SIGTERM" in signals else (signals or [""])[0]


def begin(logs: Path, recipe: str, overrides: Sequence[str]) -> None:
    """Note how far the run is before the ranks start. Raises ConfigError for a recipe that is wrong."""
    from megalm.config.load import load_recipe

    run_dir = Path(load_recipe(recipe, overrides).run.dir).absolute()
    attempts = read_attempts(logs) or Attempts(str(run_dir), newest_step(run_dir) + steps_taken_back(run_dir))
    attempts.log_bytes = {path.name: path.stat().st_size for path in rank_logs(logs)}
    write_attempts(logs, attempts)


def read_attempts(logs: Path) -> Attempts | None:
    """Return what `begin` has noted, None where it was not called or its file is damaged."""
    try:
        noted = json.loads((logs / ATTEMPTS_FILE).read_text(encoding="utf-8"))
        if "best_step" in noted:  # a job that was submitted by an earlier version
            noted["steps_done"] = noted.pop("best_step")
        return Attempts(**noted)
    except (OSError, ValueError, TypeError):
        return None


def write_attempts(logs: Path, attempts: Attempts) -> None:
    """Write `attempts.json`, whole or not at all."""
    write_durably(logs / ATTEMPTS_FILE, (json.dumps(asdict(attempts), indent=1) + "\n").encode())


def end(logs: Path, job: str, srun_status: int, record: Path | None) -> int:
    """Decide, carry it out and return the exit status of the batch script."""
    attempts = read_attempts(logs)
    before = attempts.log_bytes if attempts else {}
    ends = rank_ends(logs, before)
    status = common_status(srun_status, ends)
    job_ids = read_record(record).job_ids if record else []
    decision = decide(
        status,
        newest_step(Path(attempts.run_dir)) if attempts else 0,
        attempts,
        taken_back=steps_taken_back(Path(attempts.run_dir)) if attempts else 0,
        signal=stop_signal(ends),
        in_chain=len(job_ids) > 1,
        has_next=bool(successors(job_ids, job)),
        error=first_error(logs, before),
    )
    if attempts:
        write_attempts(logs, attempts)
    print(f"megalm: job {job}: {decision.reason}", flush=True)
    if decision.action == "requeue" and not _requeue(job):
        return decision.status or 1
    if decision.action in ("done", "stop"):
        _cancel(successors(job_ids, job))
    return decision.status


def _requeue(job: str) -> bool:
    """Put the job back into the queue, unless somebody is ending it already (scancel, a node's death)."""
    for left in reversed(range(_TRIES)):
        found = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%r"], capture_output=True, text=True, check=False
        )
        state, _, reason = found.stdout.strip().partition("|")
        if found.returncode == 0 and state != "RUNNING" and reason != "TimeLimit":
            print(f"megalm: job {job} is {state or 'gone'}: it was cancelled or is requeued already", flush=True)
            return False
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            print(f"megalm: job {job} is requeued", flush=True)
            return True
        print(f"megalm: job {job} could not be requeued: {asked.stderr.strip()}", flush=True)
        if left:
            time.sleep(_PAUSE_S)
    return False


def _cancel(jobs: Sequence[str]) -> None:
    """Cancel the chain's jobs that were to follow."""
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
        print(f"megalm: cancelled the jobs that were to follow: {', '.join(jobs)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands above; 2 for a recipe that is wrong, else the batch script's exit status."""
    parser = argparse.ArgumentParser(prog="python -m megalm.launch.requeue", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("begin")
    last = commands.add_parser("end")
    for command in (first, last):
        command.add_argument("--logs", type=Path, required=True)
    first.add_argument("recipe")
    first.add_argument("overrides", nargs="*")
    last.add_argument("--job", required=True)
    last.add_argument("--status", type=int, required=True)
    last.add_argument("--record", type=lambda text: Path(text) if text else None)
    args = parser.parse_args(arguments)
    try:
        if args.command == "begin":
            begin(args.logs, args.recipe, [word for word in args.overrides if not word.startswith("-")])
            return 0
        return end(args.logs, args.job, args.status, args.record)
    except MegalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
