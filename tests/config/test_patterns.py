"""What an attention pattern excludes, said in one line."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.errors import ConfigError
from tests.train.recipes import small_recipe

STRIDED: dict[str, Any] = {"attention_pattern": "strided", "block_size": 4, "local_blocks": 2, "block_stride": 2}
HIERARCHICAL: dict[str, Any] = {"attention_pattern": "hierarchical", "block_size": 4, "local_blocks": 2}


def test_a_pattern_is_accepted() -> None:
    pattern = small_recipe(model={**STRIDED, "global_tokens": 3}).model.block_pattern
    assert pattern == (4, 2, 2, 3, False)
    pattern = small_recipe(model=HIERARCHICAL).model.block_pattern
    assert pattern == (4, 2, None, 0, True)
    assert small_recipe().model.block_pattern is None


@pytest.mark.parametrize(
    ("model", "sections", "said"),
    [
        ({"block_size": 5}, {}, "model.sequence=16 is not divisible by model.block_size=5"),
        ({"block_size": 0}, {}, "block_size"),
        ({"local_blocks": 4}, {}, "local_blocks=4 of model.block_size=4 tokens are all of model.sequence=16"),
        (
            {"global_tokens": 9},
            {},
            "model.global_tokens=9 and model.block_stride=2 leave no token of model.sequence=16",
        ),
        ({"global_tokens": 8, "block_stride": None}, {}, "leave no token of model.sequence=16 hidden; use less of one"),
        ({"block_stride": 4}, {}, "model.block_stride=4 reaches beyond the 4 blocks of model.sequence=16"),
        ({"block_stride": 1}, {}, "model.block_stride=1 takes every block, so nothing is hidden; use 2 or more"),
        ({"window": 4}, {}, "model.window=4 and model.attention_pattern=strided both say which tokens are near"),
        ({"flash_attention": False}, {}, "model.flash_attention=false stores the whole matrix of scores"),
        (
            {"attention_dropout": 0.1},
            {"train": {"compile": True}},
            "does not work with model.attention_pattern=strided and dropped probabilities",
        ),
        ({"attention_pattern": "full"}, {}, "model.block_stride=2 has no effect without model.attention_pattern=stri"),
    ],
)
def test_what_a_pattern_excludes(model: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        small_recipe(model={**STRIDED, **model}, **sections)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("model", "sections", "said"),
    [
        ({"block_size": 5}, {}, "model.sequence=16 is not divisible by model.block_size=5; use 1, 2, 4, 8 or 16"),
        ({"block_size": 1}, {}, "model.block_size=1 makes each token its own summary, so nothing is hidden; use 2 or"),
        ({"local_blocks": 4}, {}, "local_blocks=4 of model.block_size=4 tokens are all of model.sequence=16"),
        ({"block_stride": 2}, {}, "model.block_stride=2 has no effect without model.attention_pattern=strided; leave"),
        ({"global_tokens": 3}, {}, "model.global_tokens=3 has no effect without model.attention_pattern=strided; lea"),
        ({"window": 4}, {}, "model.window=4 and model.attention_pattern=hierarchical both say which tokens are near"),
        ({"position": "t5"}, {}, "model.position=t5 learns a bias for each distance of two tokens, and a summary of"),
        ({"document_mask": True}, {}, "model.document_mask=true hides other documents, which a summary of model.att"),
        ({"flash_attention": False}, {}, "the whole matrix of scores, which model.attention_pattern=hierarchical is"),
        (
            {"attention_dropout": 0.1},
            {"train": {"compile": True}},
            "does not work with model.attention_pattern=hierarchical and dropped probabilities",
        ),
    ],
)
def test_what_summaries_exclude(model: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_recipe(model={**HIERARCHICAL, **model}, **sections)
    assert said in str(caught.value) and "\n" not in str(caught.value)
