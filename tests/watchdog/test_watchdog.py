"""A rank that stands still is named within the time-out and ten seconds, and every rank leaves its stacks."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from megalm.errors import FROZEN, HUNG
from megalm.launch.local import run_workers
from tests.end_to_end.workplace import ROOT, make_workplace

TIMEOUT_S = 10
NAMED = {
    "stop": "is stopped, as by SIGSTOP or a debugger",
    "lock": "holds the interpreter lock",
    "skip": "skipped a collective of ranks",
    "sleep": "does not go on",
}


@pytest.mark.slow
@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
@pytest.mark.parametrize(
    ("fault", "rank", "layout"),
    [
        ("stop", 0, ["parallel.tensor=2"]),
        ("stop", 3, ["parallel.tensor=2", "parallel.pipeline=2"]),
        ("lock", 1, ["parallel.pipeline=2"]),
        ("skip", 1, ["parallel.tensor=2"]),
        ("skip", 2, ["parallel.tensor=2"]),
        ("sleep", 2, ["parallel.pipeline=2", "zero.stage=1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_who_stands_still_is_named_with_all_stacks(
    fault: str, rank: int, layout: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "tests.watchdog.faulty", fault, str(rank), "4", "recipe.yaml", *layout]
    start = time.monotonic()
    status = run_workers([*command, f"run.hang_timeout_s={TIMEOUT_S}"], 4, tmp_path / "logs")
    took = time.monotonic() - start
    said = capfd.readouterr().err
    assert status == HUNG, said
    errors = [line for line in said.splitlines() if line.startswith("error: hang:")]
    assert len(errors) == 1 and errors[0].startswith(f"error: hang: rank {rank} on "), said
    assert NAMED[fault] in errors[0] and "at step 4 in" in errors[0], errors[0]
    began = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime
    print(f"{errors[0]}\n{took:.1f} s, {time.time() - began:.1f} s after the last step")
    assert time.time() - began < TIMEOUT_S + 20  # 10 on an idle machine, the end of all processes included
    for number in range(4):
        log = (tmp_path / "logs" / f"rank-{number}.log").read_text()
        assert "most recent call first" in log and "trainer.py" in log, (number, log)


ENDURING = """
import signal, time
from megalm.watchdog.watch import _obey_in_c
signal.signal(signal.SIGTERM, lambda *_: print("went on", flush=True))
_obey_in_c()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    print("step", flush=True)
"""


def test_a_frozen_rank_writes_its_stacks_and_goes_on_for_no_other_signal_than_the_end() -> None:
    with Popen([sys.executable, "-c", ENDURING], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        rank.send_signal(signal.SIGSTOP)
        rank.send_signal(FROZEN)
        rank.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGUSR1)
        before = time.monotonic()
        time.sleep(0.5)
        rank.send_signal(HUNG)
        said, stacks = rank.communicate(timeout=20)
    assert rank.returncode == HUNG and time.monotonic() - before < 10
    assert "went on" not in said and said.count("step") < 50, said  # 100 in the second that it is frozen
    assert "most recent call first" in stacks


def test_the_stacks_of_all_ranks_can_be_asked_for_from_the_start(tmp_path: Path) -> None:
    """By a signal to the launcher, while its ranks still import, and they go on."""
    make_workplace(tmp_path)
    command = [sys.executable, "-m", "megalm", "train", "recipe.yaml", "--nproc", "2"]
    with Popen(command, cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True) as launcher:
        logs = [tmp_path / "run" / "logs" / f"rank-{rank}.log" for rank in range(2)]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(log.exists() for log in logs):
            time.sleep(0.05)
        time.sleep(1.0)
        launcher.send_signal(signal.SIGUSR2)
        launcher.communicate(timeout=300)
    assert launcher.returncode == 0
    for log in logs:
        assert "most recent call first" in log.read_text(), log
