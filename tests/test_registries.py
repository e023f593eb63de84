"""The names that a recipe may use are exactly the names of implementations."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.config.choices import CHOICES, FOLDED_SCHEDULES, LOOPED_SCHEDULES, SPLITTING_SCHEDULES
from megalm.data.windows import WINDOWS
from megalm.models.build import DTYPES
from megalm.nn.mlp import ACTIVATIONS
from megalm.nn.norms import NORMS
from megalm.nn.positions import POSITIONS
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.registry import Registry
from megalm.train.lr_schedules import LR_SCHEDULES
from megalm.train.optimizers import OPTIMIZERS
from megalm.train.sinks import SINKS

REGISTRIES: dict[str, Registry[Any]] = {
    "norm": NORMS,
    "rows": WINDOWS,
    "activation": ACTIVATIONS,
    "position": POSITIONS,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "sink": SINKS,
}
WITHOUT_A_REGISTRY = {
    "adjust_lr_fn",
    "attention_pattern",
    "context_attention",
    "cooldown_shape",
    "device",
    "fp8",
    "init",
    "kernels",
    "norm_place",
    "precision",
    "reduce_dtype",
    "state_dtype",
    "stop_metric",
    "recompute",
    "rotary_scaling",
    "router_score",
}


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_choice_is_registered_and_every_registered_name_is_a_choice(kind: str) -> None:
    assert sorted(CHOICES[kind]) == REGISTRIES[kind].names()
    assert len(set(CHOICES[kind])) == len(CHOICES[kind])
    assert REGISTRIES[kind].kind == kind


def test_every_kind_of_choice_has_a_registry_or_is_known_to_have_none() -> None:
    assert CHOICES.keys() == REGISTRIES.keys() | WITHOUT_A_REGISTRY


def test_every_precision_has_a_dtype() -> None:
    assert set(CHOICES["precision"]) == set(DTYPES)


def test_the_config_knows_what_kinds_of_schedules_there_are() -> None:
    kinds = {name: SCHEDULES.get(name) for name in SCHEDULES.names()}
    assert {name for name, kind in kinds.items() if kind.fixed_chunks is None} == set(LOOPED_SCHEDULES)
    assert {name for name, kind in kinds.items() if kind.folded} == set(FOLDED_SCHEDULES)
    assert {name for name, kind in kinds.items() if kind.fixed_chunks == 2} == set(FOLDED_SCHEDULES)
    assert {name for name, kind in kinds.items() if kind.splits_backward} == set(SPLITTING_SCHEDULES)
