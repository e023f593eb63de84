"""Jobs that are asked to stop save, come back by themselves, and end with the run that nothing had interrupted.

MEGALM_TEST_REPEATS (default: 2) says how many jobs of each kind, six at a time.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megalm.launch.requeue import newest_step
from tests.end_to_end.kill import Outcome, compare
from tests.slurm.cluster import Cluster, Job
from tests.slurm.conftest import UNBROKEN

REPEATS = int(os.environ.get("MEGALM_TEST_REPEATS", "2"))
KINDS = ("time limit", "scancel --signal", "pre-emption")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200 * max(1, REPEATS // 2))]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, place: Path, unbroken: Path) -> dict[str, list[Future[Job]]]:
    """Give each job of each kind, or what went wrong with it."""
    with ThreadPoolExecutor(6) as pool:
        started: dict[str, list[Future[Job]]] = {kind: [] for kind in KINDS}
        for number in range(REPEATS):  # in turns: six jobs that wait for a time limit would start anew all the time
            for kind in KINDS:
                started[kind].append(pool.submit(interrupt, cluster, place, kind, number))
    return started


def interrupt(cluster: Cluster, place: Path, kind: str, number: int) -> Job:
    """Return a job that was interrupted in one way and has ended, whatever had become of it."""
    run = f"{kind.replace(' ', '-')}-{number}"
    partition = "low" if kind == "pre-emption" else "batch"
    # The run must last longer than the signal takes: Slurm looks at time limits twice a minute.
    limit, step_s = ("--time=2", 0.9) if kind == "time limit" else ("--time=20", 0.3)
    job = cluster.pretrain(
        place, run, [*TWO_NODES, f"--partition={partition}", limit], *UNBROKEN, MEGALM_TEST_STEP_S=str(step_s)
    )
    if kind != "time limit":
        job.wait_for_step(3)
    if kind == "scancel --signal":
        cluster.ask("scancel", "--signal=USR1", job.job_id)
    if kind == "pre-emption":
        nodes = job.facts("%N")
        wanted = ["--partition=batch", f"--nodelist={nodes}", "--nodes=2", "--exclusive", "--time=1"]
        cluster.ask("sbatch", *wanted, "--output=/dev/null", "--wrap", "sleep 1")
    job.wait(lambda: job.starts() >= 2)
    job.finish()
    return job


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_job_ends_with_the_unbroken_run(
    jobs: dict[str, list[Future[Job]]], unbroken: Path, kind: str
) -> None:
    signal = "SIGTERM" if kind == "pre-emption" else "SIGUSR1"
    for future in jobs[kind]:
        job = future.result()
        assert job.facts("%T") == "COMPLETED", job.everything()
        logs = job.workplace / "logs" / job.job_id
        saved = [f"rank {rank} on" in text and f"ended with status 75 after {signal}" in text
                 for rank in (0, 1) for text in [(logs / f"rank-{rank}.log").read_text()]]  # fmt: skip
        assert all(saved), job.everything()
        assert f"megalm: job {job.job_id}: saved at step " in job.said(), job.everything()
        assert job.steps() == list(range(1, 101)), job.everything()
        # Nothing was computed again, though the only checkpoints are those of the interruptions.
        log = (logs / "rank-0.log").read_text()
        assert all(log.count(f"step {step:>3}/100 ") == 1 for step in range(1, 101)), job.everything()
        outcome = Outcome()
        compare(unbroken, job.run, outcome)
        assert outcome.differences == [] and outcome.tensors > 50


def test_a_job_that_is_cancelled_does_not_come_back(cluster: Cluster, place: Path) -> None:
    job = cluster.pretrain(place, "cancelled", TWO_NODES, *UNBROKEN, MEGALM_TEST_STEP_S="1")
    job.wait_for_step(2)
    cluster.ask("scancel", job.job_id)
    assert job.finish() == "CANCELLED", job.everything()
    assert job.starts() == 1
    assert newest_step(job.run) < 100
