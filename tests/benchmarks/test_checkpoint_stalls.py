"""The benchmark of waits for saves: lines of metrics become shares, of steps behind the first save alone."""

from __future__ import annotations

from pathlib import Path

import checkpoint_stalls
import pytest

from megalm.config.load import load_recipe


def lines(step_s: float, stall_s: float) -> list[dict[str, float]]:
    """Return the lines of 150 steps; each save is in the line that follows it, and the first steps are slow."""
    found: list[dict[str, float]] = [{"step": 60, "evaluate/loss": 1.0}]
    for step in range(10, 151, 10):
        line = {"step": step, "time/step_s": step_s if step > 50 else 9.0}
        if stall_s and step in (60, 110):
            line |= {"checkpoint/stall_s": stall_s, "checkpoint/write_s": 0.5, "checkpoint/bytes": 3e6}
        found.append(line)
    return found


def test_waits_and_slower_steps_are_shares_of_the_steps_behind_the_first_save() -> None:
    saving, other = checkpoint_stalls.figures(lines(0.2, 1.0)), checkpoint_stalls.figures(lines(0.1, 0.0))
    assert saving == pytest.approx({"steps_s": 20.0, "stall_s": 2.0, "write_s": 1.0, "bytes": 6e6, "saves": 2})
    found = checkpoint_stalls.summary([saving] * 3, [other] * 3)
    assert found["waited"] == pytest.approx([2 / 22] * 3) and found["slowdown"] == pytest.approx([1.2] * 3)
    assert (found["interval_s"], found["stall_s"], found["write_s"], found["megabytes"]) == pytest.approx(
        (10, 1, 0.5, 3)
    )
    text = checkpoint_stalls.table({"2": found}).splitlines()
    assert len({line.count("|") for line in text}) == 1
    assert text[-1].startswith("| 2 | 10.0 s | 3.0 MB | 0.50 s | 1000.0 ms | 9.09%")


@pytest.mark.parametrize(("ranks", "every"), [(1, 50), (2, 0)])
def test_runs_save_as_often_as_is_said(tmp_path: Path, ranks: int, every: int) -> None:
    given = checkpoint_stalls.settings(tmp_path, tmp_path, ranks, {"batch": 4, "saves": 2}, every)
    config = load_recipe("gpt-tiny", given)
    assert config.checkpoint.asynchronous and config.checkpoint.every == every and config.train.steps == 150
    assert config.train.global_batch == 4 and config.train.micro_batch * ranks == 4
