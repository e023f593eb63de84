"""Whether the recipe's rules for parameters (`optim.rules`) fit its model, found out without memory and world."""

from __future__ import annotations

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.models.build import build_stage
from megalm.train.optimizers import rules_without_parameters
from megalm.zero.engine import shard_of


def check_rules(config: RunConfig, vocab: int) -> None:
    """Raise ConfigError for a rule that matches no parameter of any stage, and for rules that leave nothing to train.

    That is where they freeze all parameters, or all of a stage that ZeRO is to divide.
    """
    stages = [_names(config, vocab, stage) for stage in range(config.parallel.pipeline)]
    names = sorted(name for stage in stages for name in stage)
    for rule, is_idle in zip(config.optim.rules, rules_without_parameters(config.optim, names), strict=True):
        if is_idle:
            raise ConfigError(
                f"optim.rules: no parameter is called {rule.match!r}; names are those of a checkpoint, such as "
                f"{', '.join(names[:3])}"
            )
    trained = [sum(not _is_frozen(config, name) for name in stage) for stage in stages]
    if not any(trained):
        raise ConfigError("optim.rules freeze every parameter, so there is nothing to train; freeze fewer")
    if not all(trained) and config.zero.stage > 0:
        raise ConfigError(
            f"optim.rules freeze every parameter of a pipeline stage, where zero.stage={config.zero.stage} has nothing "
            "to divide; use zero.stage=0, or a parallel.partition with a trained layer on each stage"
        )


def _names(config: RunConfig, vocab: int, stage: int) -> list[str]:
    """Return the logical names of a pipeline stage's parameters, from a model on the meta device."""
    experts = config.parallel.expert
    layout = RankLayout(config.parallel.pipeline, data=experts, tensor=config.parallel.tensor, expert=experts)
    mesh = ParallelMesh.on_meta(layout, layout.rank(stage))
    model = config.model.model_copy(update={"kernels": "reference"})  # the fused ones ask for a device
    # Which token begins a document changes no name.
    stage_model = build_stage(config.model_copy(update={"model": model}), vocab, mesh, document_start=0)
    return [shard_of(parameter).name for parameter in stage_model.parameters()]


def _is_frozen(config: RunConfig, name: str) -> bool:
    rule = config.optim.rule_of(name)
    return rule is not None and rule.freeze
