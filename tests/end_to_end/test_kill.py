"""A run that is killed again and again ends where the unbroken one does, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.kill import WHERE, Layout, kill_and_compare, table

KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_twenty_times_ends_with_the_unbroken_runs_bits(tmp_path: Path) -> None:
    outcome = kill_and_compare(tmp_path, Layout(tensor=2), KILLS, seed=1)
    print(table(outcome))
    assert outcome.differences == []
    assert outcome.tensors > 50  # weights and both moments of Adam
    assert len(outcome.kills) == KILLS
    # By chance a kill misses the moment that it was meant for, but not each time.
    assert min(outcome.count(where) for where in WHERE) >= 1, table(outcome)
    assert outcome.kills[-1].checkpoint >= 5
    hit = {kill.target.split()[0] for kill in outcome.kills}
    assert hit == {"all", "launcher", "rank"}
