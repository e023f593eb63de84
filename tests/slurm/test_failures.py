"""Jobs whose nodes die come back by themselves; jobs that cannot work stop and say why.

Two nodes lose power, or five where MEGALM_TEST_REPEATS is set, two at a time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalm.checkpoint.names import CHECKPOINTS, find_checkpoints
from megalm.train.metrics_file import read_metrics
from tests.slurm.cluster import Cluster, Job

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
EVERY = 5
CUTS = 5 if "MEGALM_TEST_REPEATS" in os.environ else 2


def crash(cluster: Cluster, place: Path, number: int) -> tuple[Job, str, list[int]]:
    """Return a job one of whose nodes lost power, that node, and the steps done by then; every other the batch's."""
    overrides = ("train.steps=60", f"checkpoint.every={EVERY}", "parallel.tensor=2")
    options = (*TWO_NODES, "--exclusive")  # or one power cut could hit two jobs
    job = cluster.pretrain(place, f"crash-{number}", options, *overrides, MEGALM_TEST_STEP_S="0.5")
    job.wait_for_step(12)
    node = job.nodes()[number % 2]
    cluster.crash(node)
    before = job.steps()
    job.wait(lambda: job.starts() >= 2)
    return job, node, before


def losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]


def test_a_job_resumes_by_itself_on_a_spare_node(cluster: Cluster, place: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda number: crash(cluster, place, number), range(CUTS)))
    for job, node, before in outcomes:
        assert job.finish() == "COMPLETED", job.everything()
        assert node not in job.nodes()
        assert job.steps() == list(range(1, 61))
        log = (place / "logs" / job.job_id / "rank-0.log").read_text()
        counts = {step: log.count(f"step {step:>2}/60 ") for step in range(1, 61)}
        assert min(counts.values()) == 1
        again = [step for step, count in counts.items() if count > 1]
        assert len(again) <= EVERY + 2, again  # + 2: logged between the power cut and the look at the file
        assert all(step > before[-1] - EVERY - 2 for step in again)
        assert find_checkpoints(job.run / CHECKPOINTS)
    assert all(losses(job.run) == losses(outcomes[0][0].run) for job, _, _ in outcomes)
    cluster.repair()


def test_a_job_that_fails_at_once_three_times_stops_and_says_why(cluster: Cluster, place: Path) -> None:
    job = cluster.pretrain(place, "broken", TWO_NODES, "parallel.tensor=2", MEGALM_TEST_FAIL="1")
    assert job.finish() == "FAILED", job.everything()
    assert job.starts() == 3
    reason = (
        "3 starts in a row did no new step, the last one is 0: error: RuntimeError: planted: this rank cannot compute"
    )
    assert reason in job.said(), job.everything()


def test_a_user_s_mistake_is_not_requeued(cluster: Cluster, place: Path) -> None:
    """What only the ranks can see: there is no CUDA device here. Their peers are killed, which must not hide it."""
    job = cluster.pretrain(place, "mistaken", TWO_NODES, "parallel.tensor=2", "run.device=cuda")
    assert job.finish() == "FAILED", job.everything()
    assert job.starts() == 1
    assert "the input is wrong, so no further start can help: error: " in job.said(), job.everything()
