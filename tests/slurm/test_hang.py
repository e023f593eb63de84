"""A job whose ranks stand still ends with a status of its own, names who stopped first, and comes back."""

from __future__ import annotations

import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from megalm.errors import HUNG
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
FOUR_RANKS = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
TIMEOUT_S = 8
OVERRIDES = ("train.steps=30", "checkpoint.every=4", "parallel.tensor=2", f"run.hang_timeout_s={TIMEOUT_S}")
FAULTS = ("stop", "lock", "skip")
END = re.compile(r"^rank \d on node\d+ ended with status (\d+)(?: after SIG\w+)? at (\S+)$", re.MULTILINE)


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
@pytest.mark.parametrize("fault", FAULTS)
def test_who_stands_still_is_named_with_all_stacks_and_the_job_comes_back(
    cluster: Cluster, prepared: Path, tmp_path: Path, fault: str
) -> None:
    """Rank 3 stands still at step 10 of the first start, and all end by the watchdog within its time-out plus 10 s."""
    place = Path(shutil.copytree(prepared, tmp_path / "place"))
    job = cluster.pretrain(place, "hang", FOUR_RANKS, *OVERRIDES, MEGALM_TEST_FAULT=f"{fault} 3 10")
    job.finish()
    assert job.facts("%T") == "COMPLETED" and job.starts() == 2, job.everything()
    assert job.steps() == list(range(1, 31)), job.everything()
    assert f"failed with status {HUNG} at step" in job.said(), job.everything()
    logs = [(place / "logs" / job.job_id / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert "error: hang: rank 3 on node" in "".join(logs), job.everything()
    assert all("most recent call first" in log for log in logs), job.everything()
    first_ends = [END.findall(log)[0] for log in logs]
    assert {status for status, _ in first_ends} == {str(HUNG)}, job.everything()
    planted = float(re.findall(r"^planted at (\S+)$", logs[3], re.MULTILINE)[0])
    ended = max(datetime.fromisoformat(at).timestamp() for _, at in first_ends)
    assert ended - planted < TIMEOUT_S + 10, job.everything()
