"""`megalm launch slurm`, status, logs and cancel on a real cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megalm.launch.records import read_record
from tests.launch.hostile_names import CANARY
from tests.slurm.cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
SIZE = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=20")


def launch(cluster: Cluster, place: Path, *arguments: str, **more: str) -> Any:
    """Return the JSON that a command of `megalm launch` answers."""
    return json.loads(
        cluster.ask(sys.executable, "-m", "megalm", "launch", *arguments, "--json", cwd=place, MEGALM_SLURM="", **more)
    )


def states(cluster: Cluster, place: Path, run: str) -> list[str]:
    return [job["state"] for job in launch(cluster, place, "status", run)["jobs"]]


def test_a_chain_of_three_ends_by_itself_in_its_second_job(cluster: Cluster, place: Path) -> None:
    recipe = ("recipe.yaml", "run.dir=chain", "run.device=cpu", "parallel.tensor=2", "train.steps=60")
    dry = launch(cluster, place, "slurm", *recipe, *SIZE, "--chain=3", "--dry-run")
    assert dry["job_ids"] == [] and not (place / "chain").exists()
    found = launch(cluster, place, "slurm", *recipe, *SIZE, "--chain=3", MEGALM_TEST_STEP_S="0.3")
    first, second, third = (Job(cluster, place, "chain", job_id) for job_id in found["job_ids"])
    assert found["job_id"] == first.job_id
    assert (found["run_dir"], found["logs"]) == (str(place / "chain"), str(place / "chain/jobs/0001/logs"))
    first.wait_for_step(5)
    assert states(cluster, place, "chain") == ["RUNNING", "PENDING", "PENDING"]
    cluster.ask("scancel", "--signal=USR1", first.job_id)
    assert first.finish() == "FAILED"  # with 75: saved, to be continued
    assert "the next job of the chain goes on" in first.said(), first.everything()
    assert second.finish() == "COMPLETED", second.everything()
    assert third.finish() == "CANCELLED"
    assert third.said() == ""
    assert second.steps() == list(range(1, 61))
    status = launch(cluster, place, "status", "chain")
    assert status["step"] == 60
    logs = launch(cluster, place, "logs", "chain")
    assert [Path(path).name for path in logs["rank_logs"]] == ["rank-0.log", "rank-1.log"]
    assert [Path(path) for path in logs["job_logs"]] == sorted([first.log(), second.log()])
    record = read_record(place / "chain/jobs/0001")
    assert record.job_ids == found["job_ids"] and record.command == found["commands"][0]
    assert (place / "chain/jobs/0001/code.json").exists()


def test_cancel_ends_the_job_for_good(cluster: Cluster, place: Path) -> None:
    recipe = ("recipe.yaml", "run.dir=stopped", "run.device=cpu", "parallel.tensor=2")
    found = launch(cluster, place, "slurm", *recipe, *SIZE, "--chain=2", MEGALM_TEST_STEP_S="1")
    first, second = (Job(cluster, place, "stopped", job_id) for job_id in found["job_ids"])
    first.wait_for_step(2)
    answer = launch(cluster, place, "cancel", "stopped")
    assert answer["cancelled"] == [second.job_id, first.job_id]
    assert [first.finish(), second.finish()] == ["CANCELLED", "CANCELLED"]
    assert first.starts() == 1 and second.starts() == 0
    assert launch(cluster, place, "cancel", "stopped")["cancelled"] == []


def test_a_hostile_directory_is_a_name_and_nothing_else(cluster: Cluster, place: Path) -> None:
    run = f"a b;touch {CANARY};$(touch {CANARY})`touch {CANARY}`'\"&|<>*?#!~{{x,y}}"
    recipe = ("recipe.yaml", f"run.dir={json.dumps(run)}", "run.device=cpu", "train.stop_at=3")
    found = launch(cluster, place, "slurm", *recipe, *SIZE)
    job = Job(cluster, place, run, found["job_id"])
    assert job.finish() == "COMPLETED", job.everything()
    assert job.steps() == [1, 2, 3]
    assert (place / run / "jobs/0001/logs/rank-1.log").is_file()
    assert not list(place.rglob(CANARY))


def test_what_slurm_refuses_is_told_in_one_line(cluster: Cluster, place: Path) -> None:
    with pytest.raises(AssertionError, match=r"error: sbatch refused the job: .*[Ii]nvalid partition"):
        launch(cluster, place, "slurm", "recipe.yaml", "run.dir=refused", "run.device=cpu", *SIZE, "--partition=none")
    assert not (place / "refused").exists()
