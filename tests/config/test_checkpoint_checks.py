"""Keys of the section `checkpoint` that would keep nothing: refused with a remedy."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.errors import ConfigError
from tests.train.recipes import small_recipe


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"checkpoint": {"every": 400, "keep_every": 1000}},
            "keep_every=1000 is not a multiple of checkpoint.every=400, so few of its steps are saved; use 1200",
        ),
        (
            {"checkpoint": {"keep_best": "evaluate/loss"}, "evaluate": {"every": 0}},
            "keep_best=evaluate/loss is measured each evaluate.every=0 steps and saved each checkpoint.every=1000",
        ),
        (
            {"checkpoint": {"every": 400, "keep_best": "evaluate/loss"}, "evaluate": {"every": 300}},
            "use evaluate.every=400",
        ),
        (
            {"checkpoint": {"keep_best": "evaluate/ema_loss"}},
            "keep_best=evaluate/ema_loss needs averaged weights; set optim.ema_decay, or use evaluate/loss",
        ),
        (
            {"checkpoint": {"every": 0, "keep_every": 500}},
            "checkpoint.keep_every=500 has no effect without checkpoint.every",
        ),
        (
            {"checkpoint": {"every": 0, "keep_best": "train/loss"}},
            "checkpoint.keep_best=train/loss has no effect without checkpoint.every",
        ),
    ],
)
def test_what_would_keep_nothing_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_recipe(**sections)
    assert said in str(caught.value)


def test_saves_and_evaluations_need_not_be_the_same_steps() -> None:
    for saves, measures in ((400, 200), (400, 800), (400, 400)):
        section = {"every": saves, "keep_best": "evaluate/loss", "keep_every": 800}
        assert small_recipe(checkpoint=section, evaluate={"every": measures}).checkpoint.keep_best == "evaluate/loss"
    assert small_recipe(checkpoint={"keep_best": "train/loss"}, evaluate={"every": 0}).checkpoint.asynchronous
