"""A run that is asked to stop saves the step it has reached, and goes on from there as if nothing had been."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.kill import Layout, Outcome, Start, compare, finish, newest_step
from tests.end_to_end.workplace import environment, make_workplace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "numbers"),
    [
        (Layout(), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
        (Layout(tensor=2, pipeline=2, zero=1), (signal.SIGTERM,)),
    ],
    ids=["t1", "t2p2z1"],
)
def test_signals_save_and_nothing_is_computed_twice(
    tmp_path: Path, layout: Layout, numbers: tuple[signal.Signals, ...]
) -> None:
    make_workplace(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("every: 2}", "every: 0}"))
    finish(Start(tmp_path, "unbroken", layout))
    for number in numbers:
        start = Start(tmp_path, "broken", layout)
        before = newest_step(start.directory)
        assert start.wait_for(lambda start=start: len(start.steps()) >= 3)
        start.process.send_signal(number)
        assert start.process.wait(180) == 75, start.said()
        assert start.steps() == list(range(before + 1, newest_step(start.directory) + 1))
        reached = newest_step(start.directory)
        assert f"stopped: {number.name}: saved at step {reached} of 40; start again to go on" in start.said()
    finish(Start(tmp_path, "broken", layout))
    outcome = Outcome()
    compare(tmp_path / "unbroken", tmp_path / "broken", outcome)
    assert outcome.differences == [] and outcome.tensors > 50


def test_a_signal_before_the_first_step_is_not_lost(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    start = Start(tmp_path, "run", Layout())
    assert start.wait_for((start.directory / "run.json").exists)  # written before the first step
    start.process.send_signal(signal.SIGUSR1)
    assert start.process.wait(180) == 75, start.said()
    assert 1 <= newest_step(start.directory) < 40


def test_a_signal_at_the_very_start_of_workers_is_held_until_it_can_be_obeyed(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    start = Start(tmp_path, "run", Layout(tensor=2))
    assert start.wait_for(lambda: len(start.workers()) == 2)
    start.process.send_signal(signal.SIGUSR1)
    assert start.process.wait(180) == 75, start.said()
    assert 1 <= newest_step(start.directory) < 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    code = (
        "import signal, time, os; from megalm.train import interruption; interruption._INSIST_S = 0.5\n"
        "with interruption.Interruption().by_hand(tell=True): print('ready', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(2):  # one that two senders send
            process.send_signal(number)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(20) == -number


def test_ctrl_c_before_there_is_anything_to_save_ends_the_program(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    start = Start(tmp_path, "run", Layout())
    assert start.wait_for((start.directory / "run.lock").exists)
    start.process.send_signal(signal.SIGINT)
    assert start.process.wait(180) == 130, start.said()
    assert start.said().endswith("error: interrupted") and newest_step(start.directory) == 0


def test_a_signal_at_the_very_end_does_not_make_a_failure_of_it() -> None:
    """Objects of modules die after Python has given up its handlers, on which a signal would kill: status 138."""
    code = (
        "import os\nfrom megalm.train.interruption import STOPPING, Interruption\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=STOPPING):\n"
        "        for number in numbers: kill(pid, number)\n"
        "late, asked = Late(), Interruption()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
