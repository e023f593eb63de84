"""Names, and the nearest one to a name that is not known."""

from __future__ import annotations

import pytest

from megalm.errors import ConfigError
from megalm.registry import Registry, nearest


def test_a_registered_thing_is_found_by_its_name() -> None:
    registry: Registry[type] = Registry("norm")
    registered = registry.register("rmsnorm")(int)
    registry.register("layernorm")(float)
    assert registered is int
    assert registry.get("rmsnorm") is int
    assert registry.names() == ["layernorm", "rmsnorm"]


def test_an_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    registry: Registry[type] = Registry("norm")
    registry.register("rmsnorm")(int)
    registry.register("layernorm")(float)
    with pytest.raises(ConfigError) as caught:
        registry.get("layrnorm")
    assert str(caught.value) == "unknown norm 'layrnorm'; did you mean layernorm? known: layernorm, rmsnorm"
    with pytest.raises(ConfigError, match="unknown norm 'x'; known: layernorm, rmsnorm"):
        registry.get("x")


def test_a_name_is_registered_once() -> None:
    registry: Registry[type] = Registry("norm")
    registry.register("x")(int)
    with pytest.raises(AssertionError, match="norm 'x' is registered twice"):
        registry.register("x")(int)


def test_nearest_ignores_case_and_keeps_silent_about_the_distant() -> None:
    assert nearest("ADAMW", ["adamw", "sgd"]) == "adamw"
    assert nearest("tensor-parallel", ["adamw", "sgd"]) is None
