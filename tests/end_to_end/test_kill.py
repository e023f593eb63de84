"""A run that is killed again and again ends where the unbroken one does, to the bit; `make kill-loop` for more."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.end_to_end.workplace import ROOT, environment

KILLS = 5


@pytest.mark.slow
def test_a_run_killed_five_times_ends_with_the_unbroken_runs_bits() -> None:
    """In a process of its own, as it forks: a run of two ranks that share a batch's samples, under ZeRO 1."""
    command = [sys.executable, "-m", "tests.end_to_end.kill", f"--kills={KILLS}", "--layout=d2z1", "--seed=4"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0, ended.stdout
    compared = re.search(r"(\d+) tensors and (\d+) batches compared bit for bit, 0 differences", ended.stdout)
    assert compared and int(compared[1]) > 50 and int(compared[2]) >= 2 * 12, "weights, both moments, each rank's steps"
    # By chance a kill misses the moment that it was meant for, but not each time.
    saves = re.search(rf"{KILLS} kills: .* (\d+) inside a save", ended.stdout)
    assert saves and int(saves[1]) >= 1
