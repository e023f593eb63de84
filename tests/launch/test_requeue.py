"""What becomes of a job: the rules by themselves, then carried out with stand-ins for Slurm's programs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import HUNG, CorruptionError, Diverged, MegalmError, StorageError
from megalm.launch import requeue
from megalm.launch.records import JobRecord, write_record
from megalm.launch.requeue import Attempts, Decision, RankEnd, common_status, decide, stop_signal
from tests.launch.fake_slurm import FakeSlurm


def decided(status: int, step: int = 0, attempts: Attempts | None = None, **changes: object) -> Decision:
    facts = {"taken_back": 0, "signal": "SIGUSR1", "in_chain": False, "has_next": False, "error": "boom"} | changes
    return decide(status, step, attempts, **facts)  # type: ignore[arg-type]


def run(steps_done: int = 0, failures: int = 0) -> Attempts:
    return Attempts("run", steps_done, failures)


def test_a_finished_job_is_done_and_a_mistake_is_never_repeated() -> None:
    assert decided(0, 40, run()).action == "done"
    mistake = decided(2, 0, run())
    assert (mistake.action, mistake.status) == ("stop", 2)
    assert "boom" in mistake.reason


@pytest.mark.parametrize("error", [CorruptionError, Diverged])
def test_what_another_start_would_only_repeat_stops_the_job(error: type[MegalmError]) -> None:
    """Even where steps were made: a requeue after corruption would resume on the broken GPU."""
    decision = decided(error.exit_status, 500, Attempts("run", 100), signal="", in_chain=True, has_next=True, error="x")
    assert (decision.action, decision.status) == ("stop", error.exit_status)
    ends = [RankEnd(0, "a", 143, "SIGTERM"), RankEnd(1, "b", error.exit_status, "")]
    assert common_status(143, ends) == error.exit_status


def test_a_disk_that_refuses_is_another_start_s_chance() -> None:
    decision = decided(StorageError.exit_status, 500, Attempts("run", 100), error="no space")
    assert decision.action == "requeue"


def test_a_saved_job_is_requeued_and_its_failures_are_forgotten() -> None:
    attempts = run(steps_done=10, failures=2)
    assert decided(75, 12, attempts) == Decision("requeue", "saved at step 12", 75)
    assert attempts == run(steps_done=12, failures=0)


@pytest.mark.parametrize(
    ("signal", "has_next", "action"),
    [
        ("SIGUSR1", True, "next"),
        ("SIGUSR1", False, "stop"),
        ("SIGTERM", True, "requeue"),
        ("SIGTERM", False, "requeue"),
    ],
)
def test_in_a_chain_the_time_limit_hands_over_and_a_pre_empted_job_comes_back(
    signal: str, has_next: bool, action: str
) -> None:
    assert decided(75, 5, run(), signal=signal, in_chain=True, has_next=has_next).action == action


@pytest.mark.parametrize("status", [1, HUNG, 134, 137, 143])
def test_three_failures_without_a_new_step_end_the_job_and_say_why(status: int) -> None:
    attempts = run(steps_done=7)
    assert [decided(status, 7, attempts).action for _ in range(2)] == ["requeue", "requeue"]
    last = decided(status, 7, attempts)
    assert (last.action, last.status) == ("stop", status)
    assert last.reason == f"failed with status {status}; 3 starts in a row did no new step, the last one is 7: boom"


def test_a_failure_with_a_new_step_counts_from_the_beginning() -> None:
    attempts = run()
    steps = [0, 0, 3, 3, 2, 9, 9, 9]
    assert [decided(1, step, attempts).action for step in steps] == ["requeue"] * len(steps)
    assert decided(1, 9, attempts).action == "stop"


def test_steps_behind_a_rollback_are_new_ones(tmp_path: Path) -> None:
    attempts = run(steps_done=100)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 60}\n{"step": 60, "event": "went back", "from_step": 103, "reason": "x"}\n{"step": 62}\n'
    )
    taken_back, step = requeue.steps_taken_back(tmp_path), requeue.newest_step(tmp_path)
    assert (taken_back, step) == (43, 62)
    assert decided(1, step, attempts, taken_back=taken_back).action == "requeue"
    assert attempts == run(steps_done=105, failures=0)
    assert requeue.steps_taken_back(tmp_path / "none") == 0


def test_a_job_that_cannot_resume_is_repeated_only_after_a_pre_emption() -> None:
    assert decided(143, signal="SIGTERM").action == "requeue"
    assert decided(143, signal="").action == "stop"
    assert decided(1, signal="").action == "stop"


def test_what_srun_sends_to_the_peers_of_a_rank_that_failed_is_no_pre_emption() -> None:
    """Else a job without checkpoints, whose rank fails each time, would be repeated for ever."""
    asked, saved, over = RankEnd(0, "a", 143, "SIGTERM"), RankEnd(1, "b", 75, "SIGUSR1"), RankEnd(2, "c", 0, "")
    assert stop_signal([asked, over]) == "SIGTERM"
    assert stop_signal([saved, asked]) == "SIGTERM"
    assert stop_signal([saved, over]) == "SIGUSR1"
    assert stop_signal([asked, RankEnd(1, "b", 1, "")]) == ""
    assert stop_signal([]) == ""


def test_one_status_for_all_ranks() -> None:
    saved, mistake, failed = (RankEnd(0, "n", status, "") for status in (75, 2, 1))
    assert common_status(0, []) == 0
    assert common_status(0, [saved, saved]) == 75
    assert common_status(137, [mistake]) == 2  # its peers were killed, which says nothing
    assert common_status(1, [saved, failed]) == 1
    assert common_status(137, [saved]) == 137
    assert common_status(2, []) == 1  # srun's own, for no rank has said so


def test_the_newest_step_is_the_last_logged_or_saved(tmp_path: Path) -> None:
    assert requeue.newest_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 4}\n{"step": 2, "tokens": 8}\n{"step": 35')
    assert requeue.newest_step(tmp_path) == 2
    (tmp_path / "checkpoints/step-00000030").mkdir(parents=True)
    (tmp_path / "checkpoints/.step-00000040.partial").mkdir()
    assert requeue.newest_step(tmp_path) == 30
    with (tmp_path / "metrics.jsonl").open("w") as stream:
        stream.writelines(f'{{"step": {step}, "tokens": 1, "pad": "{"x" * 100}"}}\n' for step in range(2000))
    assert requeue.newest_step(tmp_path) == 1999


def test_the_first_error_is_of_the_rank_that_spoke_last_the_longest_ago_and_of_this_start(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(3)]
    logs[0].write_text("error: of an earlier start\n")
    before = {"rank-0.log": logs[0].stat().st_size}
    assert requeue.first_error(tmp_path, before).startswith("no rank says why")
    with logs[0].open("a") as stream:
        stream.write("step 1\nDistributedError: rank 1 is gone\n")
    logs[1].write_text("Traceback (most recent call last):\n  File x\nValueError: first\n")
    logs[2].write_text("fine\n")
    now = time.time()
    for log, age in zip(logs, (1, 5, 9), strict=True):
        os.utime(log, (now - age, now - age))
    assert requeue.first_error(tmp_path, before) == f"ValueError: first ({logs[1]})"


def test_only_this_start_s_ends_count(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("rank 0 on a ended with status 75 after SIGUSR1 at 2026-01-02T03:04:05\n")
    before = {"rank-0.log": log.stat().st_size}
    assert requeue.rank_ends(tmp_path, {}) == [RankEnd(0, "a", 75, "SIGUSR1")]
    assert requeue.rank_ends(tmp_path, before) == []
    with log.open("a") as stream:
        stream.write("x\nrank 0 on b ended with status 0 at 2026-01-02T03:04:05\n")
    assert requeue.rank_ends(tmp_path, before) == [RankEnd(0, "b", 0, "")]


def test_what_an_earlier_version_wrote_still_counts(tmp_path: Path) -> None:
    """A submission runs its own copy of the scripts, whatever version is installed when it starts."""
    (tmp_path / "rank-0.log").write_text("rank 0 on a ended with status 75 after SIGUSR1\n")
    assert requeue.rank_ends(tmp_path, {}) == [RankEnd(0, "a", 75, "SIGUSR1")]
    noted = {"run_dir": "run", "best_step": 7, "failures": 1, "log_bytes": {}}
    (tmp_path / "attempts.json").write_text(json.dumps(noted))
    assert requeue.read_attempts(tmp_path) == run(steps_done=7, failures=1)


class Job:
    """A job's folders, stand-ins for Slurm, and its end."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, job_ids: list[str]) -> None:
        self.slurm = FakeSlurm(place / "fake")
        monkeypatch.setenv("PATH", f"{self.slurm.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(requeue, "_PAUSE_S", 0.0)
        self.record, self.logs, self.run = place / "0001", place / "0001/logs", place / "run"
        self.logs.mkdir(parents=True)
        write_record(self.record, JobRecord(str(self.run), str(place), "now", ["sbatch"], job_ids))
        requeue.write_attempts(self.logs, Attempts(str(self.run), 0))
        self.slurm.answers("squeue", "RUNNING|None\n")

    def end(self, status: int, said: str = "", job: str = "101") -> int:
        with (self.logs / "rank-0.log").open("a") as log:
            log.write(said)
        arguments = ["end", "--logs", str(self.logs), "--job", job, "--status", str(status)]
        return requeue.main([*arguments, "--record", str(self.record)])


def test_a_saved_job_asks_slurm_to_requeue_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, ["101"])
    assert job.end(0, "rank 0 on a ended with status 75 after SIGUSR1 at 2026-01-02T03:04:05\n") == 75
    assert job.slurm.calls("scontrol") == [["scontrol", "requeue", "101"]]
    assert job.slurm.calls("scancel") == []


def test_a_cancelled_job_stays_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, ["101"])
    job.slurm.answers("squeue", "COMPLETING|None\n")
    assert job.end(0, "rank 0 on a ended with status 75 after SIGTERM at 2026-01-02T03:04:05\n") == 75
    assert job.slurm.calls("scontrol") == []
    job.slurm.answers("squeue", "COMPLETING|TimeLimit\n")
    job.end(0, "rank 0 on a ended with status 75 after SIGTERM at 2026-01-02T03:04:05\n")
    assert job.slurm.calls("scontrol") == [["scontrol", "requeue", "101"]]


def test_a_requeue_that_slurm_refuses_is_tried_again_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, monkeypatch, ["101"])
    job.slurm.answers("scontrol", "Requested operation is presently disabled", code=1)
    assert job.end(1, "ValueError: boom\n") == 1
    assert len(job.slurm.calls("scontrol")) == 5
    assert "could not be requeued: Requested operation is presently disabled" in capsys.readouterr().out


def test_the_end_of_a_chain_cancels_what_was_to_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, ["101", "102", "103"])
    assert job.end(0, "rank 0 on a ended with status 75 after SIGUSR1 at 2026-01-02T03:04:05\n") == 75
    assert job.slurm.calls("scontrol") + job.slurm.calls("scancel") == []  # the next job goes on
    assert job.end(0, "rank 0 on a ended with status 0 at 2026-01-02T03:04:05\n", job="102") == 0
    assert job.slurm.calls("scancel") == [["scancel", "103"]]


def test_three_starts_in_a_row_are_remembered_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, monkeypatch, ["101"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: gpt-tiny\nrun: {{dir: {job.run}}}\n")
    for _ in range(3):
        assert requeue.main(["begin", "--logs", str(job.logs), "--", str(recipe), "train.steps=99", "--fresh"]) == 0
        assert job.end(1, "ValueError: boom\n") == 1
    assert len(job.slurm.calls("scontrol")) == 2
    assert "3 starts in a row did no new step, the last one is 0: ValueError: boom" in capsys.readouterr().out
    assert requeue.read_attempts(job.logs).failures == 3


def test_an_earlier_run_s_steps_are_no_progress(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 500}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: gpt-tiny\nrun: {{dir: {tmp_path / 'run'}}}\n")
    assert requeue.main(["begin", "--logs", str(tmp_path), "--", str(recipe)]) == 0
    attempts = json.loads((tmp_path / "attempts.json").read_text())
    assert (attempts["steps_done"], attempts["failures"]) == (500, 0)
    assert decided(1, 500, replace(Attempts(**attempts), failures=2)).action == "stop"


def test_a_wrong_recipe_ends_the_job_before_any_rank_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert requeue.main(["begin", "--logs", str(tmp_path), "--", "gpt-tiny", "model.haeds=2"]) == 2
    assert "error: command line: " in capsys.readouterr().err
