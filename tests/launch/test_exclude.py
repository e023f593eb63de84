"""What a preflight found is asked of Slurm for the jobs that wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.launch.exclude import exclude
from megalm.launch.records import JobRecord, read_record, write_record
from tests.launch.fake_slurm import FakeSlurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    programs = FakeSlurm.on_path(tmp_path / "fake", monkeypatch)
    write_record(tmp_path, JobRecord("run", ".", "now", ["sbatch"], ["8", "9"], preflight_job="7", excluded="node1"))
    return programs


def test_failed_nodes_join_those_excluded_before_for_every_job_of_the_chain(fake: FakeSlurm, tmp_path: Path) -> None:
    assert exclude(tmp_path, ["node3", "node5"], 4) == "preflight: node3, node5 excluded from job 8, 9"
    assert fake.calls() == [["scontrol", "update", f"JobId={job}", "ExcNodeList=node1,node3,node5"] for job in "89"]
    assert read_record(tmp_path).excluded == "node1,node3,node5"


def test_healthy_nodes_change_nothing(fake: FakeSlurm, tmp_path: Path) -> None:
    assert exclude(tmp_path, [], 4) == "preflight: no node is excluded"
    assert fake.calls() == []


def test_where_all_nodes_fail_the_jobs_are_cancelled_and_not_left_waiting(fake: FakeSlurm, tmp_path: Path) -> None:
    assert "all 3 nodes failed" in exclude(tmp_path, ["node3", "node4", "node5"], 3)
    assert fake.calls() == [["scancel", "9", "8"]]


def test_a_single_node_that_fails_is_excluded(fake: FakeSlurm, tmp_path: Path) -> None:
    assert exclude(tmp_path, ["node3"], 1) == "preflight: node3 excluded from job 8, 9"


def test_what_slurm_refuses_is_said(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.answers("scontrol", "Job is no longer pending", 1)
    said = exclude(tmp_path, ["node3"], 2)
    why = "could not be kept away from node1,node3: Job is no longer pending"
    assert said == f"preflight: job 8 {why}; job 9 {why}"
    assert read_record(tmp_path).excluded == "node1"
