"""The small recipe that the tests of the training loop's parts change one key of at a time."""

from __future__ import annotations

from typing import Any

from megalm.config.run import RunConfig


def small_recipe(**sections: dict[str, Any] | Any) -> RunConfig:
    """Return a valid recipe; `sections` are merged into it: `small_recipe(train={"steps": 5}, seed=3)`."""
    values: dict[str, Any] = {
        "model": {"layers": 2, "hidden": 8, "heads": 2, "sequence": 16},
        "train": {"steps": 100, "global_batch": 4, "micro_batch": 2},
        "optim": {"lr": 1e-3},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate(values)
