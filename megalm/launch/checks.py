"""What is checked before anything is started: the world, the DeepSpeed JSON, the data, the device, the sinks' packages,
the rules for parameters.

Heavy modules are imported inside the functions that need them, and torch only where a device is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from megalm.errors import ConfigError

if TYPE_CHECKING:
    from megalm.config.run import RunConfig
    from megalm.data.datasets import PreparedData


def check_world(config: RunConfig, world: int) -> int:
    """Return the data-parallel ranks in a world of that many ranks, with the DeepSpeed JSON checked as well.

    Raises ConfigError where the recipe does not fit them.
    """
    from megalm.config import checks
    from megalm.config.deepspeed import deepspeed_config

    data_size = checks.check_world(config, world)
    deepspeed_config(config, data_size)
    return data_size


def check_device(config: RunConfig) -> None:
    """Raise ConfigError for a device that this machine lacks, or what needs one. torch is asked only then."""
    train = config.train
    masks = train.compile and config.model.draws_masks
    needs_one = config.model.kernels == "fused" or train.fp8 != "none" or train.offload_activations or masks
    if config.run.device == "cuda" or needs_one:
        from megalm.distributed import world

        world.check_device(config)


def check_sinks(config: RunConfig) -> None:
    """Raise ConfigError for a sink whose package is missing here; nothing is imported."""
    for name in config.log.sinks:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is none
            raise ConfigError(
                f"log.sinks=[{', '.join(config.log.sinks)}] needs the package {name}, which is not installed here; "
                f"pip install {name}, or leave {name} out"
            )


def check_rules(config: RunConfig, data: PreparedData) -> None:
    """Raise ConfigError for `optim.rules` that do not fit the model. torch is asked only where there are some."""
    if config.optim.rules:
        from megalm.train import parameter_rules

        parameter_rules.check_rules(config, config.model.vocab or data.vocabulary)


def check_data(config: RunConfig) -> PreparedData:
    """Return the prepared data. Raises DataError or ConfigError unless it is whole and fits the recipe."""
    from megalm.data.datasets import open_prepared
    from megalm.data.windows import all_windows

    path = config.data.path
    data = open_prepared(path)
    vocab = config.model.vocab
    if vocab is not None and vocab < data.vocabulary:
        raise ConfigError(
            f"model.vocab={vocab} is smaller than the {data.vocabulary} tokens of the tokenizer in {path}; "
            f"use {data.vocabulary} or more, or leave model.vocab out"
        )
    sequence, tokens = config.model.sequence, len(data.train)
    if tokens <= sequence:
        raise ConfigError(
            f"model.sequence={sequence} is not shorter than the {tokens} training tokens in {path}; "
            "use a smaller model.sequence or more text"
        )
    all_windows(data.validation, sequence, config.data.rows)
    config.with_windows(len(data.windows(sequence, config.data.rows)))  # a length in epochs may break rules now
    return data
