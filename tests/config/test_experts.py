"""The rules of a mixture of experts: what divides what, what excludes what, which keys are idle without."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.config.run import RunConfig, check_world
from megalm.errors import ConfigError
from tests.parity.harness import Case

EXPERTS: dict[str, Any] = {"model.experts": 8}
DIVIDED: dict[str, Any] = {**EXPERTS, "parallel.expert": 2}


def config(**overrides: Any) -> RunConfig:
    return Case(overrides=overrides).config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.experts_per_token": 8}, "leaves nothing to choose among model.experts=8; use 1 to 7"),
        ({"model.dense_layers": 4}, "leaves no layer of model.layers=4 for model.experts=8; use at most 3"),
        (
            {"model.expert_ffn": 9, "parallel.tensor": 2},
            "model.expert_ffn=9 is not divisible by parallel.tensor=2; use",
        ),
        ({"parallel.expert": 3}, "model.experts=8 is not divisible by parallel.expert=3; use 1, 2, 4 or 8"),
        ({"model.mup_base": 16}, "nothing of routers; use none with model.experts"),
        ({"train.compile": True}, "is known only while it runs; use train.compile=false"),
        ({"parallel.expert": 2, "zero.stage": 3}, "use zero.stage=0, 1 or 2, or parallel.expert=1"),
        ({"parallel.expert": 2, "optim.kind": "adafactor"}, "use another kind, or parallel.expert=1"),
    ],
)
def test_what_experts_exclude_is_refused_with_a_remedy(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**EXPERTS, **overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.experts_per_token", 1),
        ("model.expert_ffn", 8),
        ("model.shared_experts", 1),
        ("model.dense_layers", 1),
        ("model.capacity_factor", 1.0),
        ("model.router_score", "sigmoid"),
        ("model.router_bias_rate", 0.1),
        ("loss.load_balance", 0.1),
        ("loss.router_z", 0.1),
        ("parallel.expert", 2),
    ],
)
def test_keys_of_experts_have_no_effect_without(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.* has no effect without model.experts; leave it out$"):
        config(**{key: value})
    config(**EXPERTS, **{key: value})


def test_the_data_ranks_are_a_multiple_of_those_that_divide_the_experts() -> None:
    assert check_world(config(**DIVIDED), 4) == 4
    assert config(**DIVIDED).parallel.least_ranks == 2
    with pytest.raises(ConfigError, match=r"parallel\.expert=2 does not divide the 1 ranks that hold the same layers"):
        check_world(config(**DIVIDED), 1)


def test_worlds_that_are_recommended_divide_the_experts() -> None:
    recipe = config(**DIVIDED, **{"train.global_batch": 8, "train.micro_batch": 2})
    with pytest.raises(ConfigError, match=r"use 12 for train\.global_batch, or 2 or 4 ranks, or train\.pad"):
        check_world(recipe, 6)


def test_a_width_that_nothing_has_is_idle() -> None:
    with pytest.raises(ConfigError, match=r"model\.ffn=999 has no effect without a layer without experts"):
        config(**EXPERTS, **{"model.expert_ffn": 16, "model.ffn": 999})
    assert config(**EXPERTS, **{"model.expert_ffn": 16, "model.ffn": 999, "model.dense_layers": 1}).model.ffn == 999


def test_layers_and_widths_that_follow_from_the_recipe() -> None:
    model = config(**EXPERTS, **{"model.dense_layers": 1, "model.shared_experts": 2, "model.ffn": 12}).model
    assert [model.has_experts(layer) for layer in range(4)] == [False, True, True, True]
    assert (model.expert_features, model.shared_features) == (12, 24)
    assert model.model_copy(update={"expert_ffn": 5}).shared_features == 10
