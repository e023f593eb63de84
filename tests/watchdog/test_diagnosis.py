"""Who is named from what the ranks last reported: every way to stand still, in made-up worlds."""

from __future__ import annotations

import pytest

from megalm.watchdog.diagnosis import Report, find_culprits

FORWARD, REDUCE, UPDATE = 2, 3, 4
WORLD = "world"


def world(**changes: dict[str, object]) -> dict[int, Report]:
    """Return tensor 2 x data 2: ranks 0, 1 and 2, 3 share a tensor group, 0, 2 and 1, 3 a data group."""
    reports = {}
    for rank in range(4):
        counts = {f"t{rank // 2}": 40, f"d{rank % 2}": 8, WORLD: 3}
        given = dict(changes.get(f"r{rank}", {}))
        counts.update(given.pop("collectives", {}))  # type: ignore[call-overload]
        reports[rank] = Report(rank, f"node{rank // 2}", collectives=counts, **{"step": 4, "phase": FORWARD, **given})
    return reports


def named(reports: dict[int, Report]) -> list[int]:
    return [culprit.rank for culprit in find_culprits(reports)]


@pytest.mark.parametrize("rank", range(4))
def test_a_process_that_does_not_run_is_named_whatever_the_others_wait_for(rank: int) -> None:
    behind = {"collectives": {f"t{rank // 2}": 39}}
    for state, reason in (
        ({"stopped": True}, "SIGSTOP"),
        ({"stale_s": 9.0}, "interpreter lock"),
        ({"silent_s": 9.0, "stale_s": 9.0}, "is gone: its host node"),
    ):
        (culprit,) = find_culprits(world(**{f"r{rank}": {**behind, **state}}))
        assert culprit.rank == rank and reason in culprit.reason


def test_a_chain_of_waiting_leads_to_the_rank_that_waits_for_nobody() -> None:
    # 3 sleeps before its tensor group's collective 40; 2 waits for it, 0 waits for 2 and 1 for 3 in the data groups.
    reports = world(
        r0={"phase": REDUCE, "collectives": {"d0": 9}},
        r1={"phase": REDUCE, "collectives": {"d1": 9}},
        r3={"collectives": {"t1": 39}, "place": "linear.py:7 in forward"},
    )
    (culprit,) = find_culprits(reports)
    assert culprit.rank == 3
    assert culprit.reason == "does not go on, at step 4 in forward and backward (linear.py:7 in forward)"


def test_a_message_that_does_not_come_leads_to_its_sender() -> None:
    reports = {rank: Report(rank, "node", step=4, phase=FORWARD, collectives={WORLD: 3}) for rank in range(3)}
    reports[2] = Report(2, "node", step=4, phase=FORWARD, collectives={WORLD: 3}, waits_for=1)
    reports[1] = Report(1, "node", step=4, phase=FORWARD, collectives={WORLD: 3}, waits_for=0)
    assert named(reports) == [0]


@pytest.mark.parametrize("rank", range(4))
def test_who_skipped_a_collective_is_further_on_in_the_circle(rank: int) -> None:
    # It missed one of its tensor group; with its data neighbour it went on into the world's, where both wait.
    mine, other = f"d{rank % 2}", f"d{1 - rank % 2}"
    reports = world(
        **{
            f"r{rank}": {"phase": UPDATE, "collectives": {f"t{rank // 2}": 39, mine: 9, WORLD: 4}},
            f"r{rank ^ 2}": {"phase": UPDATE, "collectives": {mine: 9, WORLD: 4}},
            f"r{rank ^ 3}": {"phase": REDUCE, "collectives": {other: 9}},
        }
    )
    (culprit,) = find_culprits(reports)
    assert culprit.rank == rank
    first = rank // 2 * 2
    assert culprit.reason.startswith(f"skipped a collective of ranks {first}, {first + 1}: the others are there")


def test_several_that_stand_at_the_same_place_are_all_named() -> None:
    asleep = {"collectives": {WORLD: 2}, "phase": FORWARD}
    assert named(world(r1=asleep, r3=asleep)) == [1, 3]
    assert named(world()) == [0, 1, 2, 3]  # nobody waits for anybody, and nobody goes on


def test_of_two_that_do_not_wait_the_one_that_others_wait_for_is_named() -> None:
    reports = world(r0={"collectives": {WORLD: 2}}, r3={"phase": UPDATE})
    del reports[3].collectives[WORLD]  # type: ignore[attr-defined]
    assert named(reports) == [0]
