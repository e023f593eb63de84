"""After a preflight: the jobs that wait for it are kept away from the nodes that failed.

    python -m megalm.launch.exclude RECORD FILE

`slurm/preflight.sbatch` calls it where `megalm launch slurm --preflight` submitted it. FILE names the failed nodes, one
a line, RECORD is the directory of the submission. Slurm lets nodes be excluded from jobs that have not started, hence
two jobs. No torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalm.errors import MegalmError
from megalm.launch.records import read_record, write_record

_TOO_MANY = 3
"""Where so many nodes were examined and all failed, it is nothing that other nodes would do better."""


def exclude(directory: Path, failed: Sequence[str], examined: int) -> str:
    """Exclude failed nodes from the record's jobs, or cancel these if all nodes failed; return what was done.

    Raises ConfigError for a damaged record, OSError where Slurm's programs are missing.
    """
    record = read_record(directory)
    if not failed:
        return "preflight: no node is excluded"
    if len(failed) >= examined >= _TOO_MANY:
        subprocess.run(["scancel", *reversed(record.job_ids)], check=False)
        return f"preflight: all {examined} nodes failed, which other nodes do not mend: the jobs are cancelled"
    names = ",".join([*filter(None, [record.excluded]), *failed])
    refused = []
    for job in record.job_ids:
        asked = subprocess.run(
            ["scontrol", "update", f"JobId={job}", f"ExcNodeList={names}"], capture_output=True, text=True, check=False
        )
        if asked.returncode:
            refused.append(f"job {job} could not be kept away from {names}: {' '.join(asked.stderr.split())}")
    if refused:
        return f"preflight: {'; '.join(refused)}"
    write_record(directory, replace(record, excluded=names))
    return f"preflight: {', '.join(failed)} excluded from job {', '.join(record.job_ids)}"


def main() -> int:
    """Read the failed nodes and exclude them; what goes wrong is said, and the jobs start as they are."""
    directory, file = map(Path, sys.argv[1:])
    try:
        failed = file.read_text(encoding="utf-8").split()
        print(exclude(directory, failed, int(os.environ["SLURM_JOB_NUM_NODES"])), flush=True)
    except (OSError, MegalmError) as error:
        print(f"preflight: nothing is excluded: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
