"""Random recipes in random layouts: each trains as the reference does, or is refused before anything starts."""

from __future__ import annotations

import pytest

from tests.parity.fuzz import draw, refusal, verdict
from tests.worker_pool import WorkerPool

COUNT = 30
BLOCK = 10


@pytest.mark.parametrize("first", range(0, COUNT, BLOCK))
def test_random_recipes_train_as_the_reference_does_or_are_refused(pool: WorkerPool, first: int) -> None:
    found = {number: verdict(pool, draw(number)) for number in range(first, first + BLOCK)}
    wrong = {number: one.wrong for number, one in found.items() if one.wrong}
    assert not wrong


def test_not_so_many_recipes_are_refused_that_little_is_tried() -> None:
    refused = [refusal(draw(number)) for number in range(200)]
    assert sum(one is None for one in refused) >= 200 // 4
    assert not [one.wrong for one in refused if one is not None and one.wrong]


def test_a_recipe_is_a_function_of_its_number() -> None:
    assert draw(3) == draw(3) != draw(4)
