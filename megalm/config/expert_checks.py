"""The rules of a mixture of experts: how many there may be, what divides them, and what excludes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import not_divisible, rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


@rule("model.experts", "model.experts_per_token")
def _a_token_chooses_among_experts(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.experts is not None and model.experts_per_token >= model.experts:
        yield (
            f"model.experts_per_token={model.experts_per_token} leaves nothing to choose among model.experts="
            f"{model.experts}; use 1 to {model.experts - 1}"
        )


@rule("model.experts", "model.dense_layers", "model.layers")
def _some_layer_has_experts(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.experts is not None and model.dense_layers >= model.layers:
        yield (
            f"model.dense_layers={model.dense_layers} leaves no layer of model.layers={model.layers} for "
            f"model.experts={model.experts}; use at most {model.layers - 1}"
        )


@rule("model.expert_ffn", "model.experts", "model.ffn", "model.hidden", "model.activation", "parallel.tensor")
def _tensor_divides_an_expert(config: RunConfig) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if model.experts is not None and model.expert_ffn is not None and model.expert_ffn % tensor:
        yield not_divisible("model.expert_ffn", model.expert_ffn, "parallel.tensor", tensor)


@rule("model.experts", "parallel.expert")
def _the_expert_axis_divides_experts(config: RunConfig) -> Iterator[str]:
    experts, ranks = config.model.experts, config.parallel.expert
    if experts is not None and experts % ranks:
        yield not_divisible("model.experts", experts, "parallel.expert", ranks)


@rule("model.experts", "model.mup_base")
def _mup_says_nothing_of_routers(config: RunConfig) -> Iterator[str]:
    if config.model.experts is not None and config.model.mup_base is not None:
        yield (
            f"model.mup_base={config.model.mup_base} says how a rate moves with a width, and nothing of routers; "
            "use none with model.experts"
        )


@rule("model.experts", "train.compile")
def _experts_are_not_compiled(config: RunConfig) -> Iterator[str]:
    if config.model.experts is not None and config.train.compile:
        yield (
            "train.compile=true makes one program of a block, but how many tokens each of model.experts="
            f"{config.model.experts} gets is known only while it runs; use train.compile=false"
        )


@rule("parallel.expert", "zero.stage")
def _zero_3_divides_over_all_data_ranks(config: RunConfig) -> Iterator[str]:
    if config.parallel.expert > 1 and config.zero.stage == 3:
        yield (
            f"zero.stage=3 divides all weights over all replicas, and parallel.expert={config.parallel.expert} gives "
            "these different experts; use zero.stage=0, 1 or 2, or parallel.expert=1"
        )


@rule("parallel.expert", "optim.kind")
def _states_by_parameter_need_all_ranks(config: RunConfig) -> Iterator[str]:
    if config.parallel.expert > 1 and config.optim.kind in ("adafactor", "adamw8bit"):
        yield (
            f"optim.kind={config.optim.kind} takes all replicas to hold the same matrices, which those of "
            f"parallel.expert={config.parallel.expert} do not; use another kind, or parallel.expert=1"
        )


@rule("model.scores_head_dim", "model.mup_base_head_dim")
def _scores_have_one_divisor(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.scores_head_dim is not None and model.mup_base_head_dim is not None:
        yield (
            f"model.scores_head_dim={model.scores_head_dim} and model.mup_base_head_dim={model.mup_base_head_dim} "
            "both say what scores are divided by; leave one of them out"
        )
