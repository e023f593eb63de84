"""The rules of a recipe's optimizer: what it needs, and beside what it cannot be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig

_TORCHS = "adamw, fused_adamw, adam, lion, rmsprop, adagrad or sgd with momentum"


@rule("model.mup_base", "optim.kind")
def _widths_transfer_under_some_optimizers(config: RunConfig) -> Iterator[str]:
    kind = config.optim.kind
    why = {"sgd": "does not", "adafactor": "takes its rate times the size of the weights besides"}.get(kind)
    if config.model.mup_base is not None and why is not None:
        yield (
            "model.mup_base says how rates of optimizers that divide by the gradient's size change with the width; "
            f"optim.kind={kind} {why}; use adamw, fused_adamw, adam, lion, rmsprop or adagrad"
        )


@rule("model.mup_base", "optim.kind", "optim.muon_adjust_lr_fn")
def _orthogonal_updates_transfer_by_their_own_scale(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if config.model.mup_base is not None and optim.kind == "muon" and optim.muon_adjust_lr_fn != "original":
        yield (
            f"model.mup_base says which rates are right for all widths, and optim.muon_adjust_lr_fn="
            f"{optim.muon_adjust_lr_fn} has what a hidden matrix gives move by the root of the width; use original"
        )


@rule("optim.kind", "optim.muon_adjust_lr_fn", "optim.adamw_lr")
def _two_optimizers_have_two_rates(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if optim.kind == "muon" and optim.muon_adjust_lr_fn == "original" and optim.adamw_lr is None:
        yield (
            f"optim.muon_adjust_lr_fn=original needs optim.adamw_lr, the rate of all but hidden matrices, where "
            f"optim.lr={optim.lr:g} is Muon's alone: 3e-4 beside 0.02, for one; set it, or use match_rms_adamw"
        )


@rule("optim.rules", "optim.kind")
def _only_muon_leaves_matrices_to_adamw(config: RunConfig) -> Iterator[str]:
    for each in config.optim.rules:
        if not each.muon and config.optim.kind != "muon":
            yield (
                f"optim.rules: muon=false of {each.match!r} has no effect with optim.kind={config.optim.kind}; "
                "leave it out"
            )


@rule("optim.rules")
def _frozen_parameters_have_no_rate(config: RunConfig) -> Iterator[str]:
    for each in config.optim.rules:
        if each.freeze and (each.lr != 1.0 or each.weight_decay is not None or not each.muon):
            yield (
                f"optim.rules: {each.match!r} has freeze=true, where lr, weight_decay and muon mean nothing; "
                "leave them out"
            )


@rule("optim.kind", "zero.stage", "parallel.tensor", "precision")
def _blocks_of_eight_bits_lie_in_whole_parameters(config: RunConfig) -> Iterator[str]:
    if config.optim.kind != "adamw8bit":
        return
    for key, value, needed in (
        ("zero.stage", config.zero.stage, 0),
        ("parallel.tensor", config.parallel.tensor, 1),
    ):
        if value != needed:
            yield (
                "optim.kind=adamw8bit codes its state in blocks of 256 numbers as they lie in memory, and "
                f"{key}={value} would cut parameters elsewhere than other layouts do; use {key}={needed}, or "
                "optim.state_dtype=bf16 with adamw"
            )
    if config.precision == "fp64":
        yield "optim.kind=adamw8bit computes in fp32, which precision=fp64 is there to check; use adamw"


@rule("optim.kind", "zero.stage")
def _apex_counts_steps_by_group(config: RunConfig) -> Iterator[str]:
    if config.optim.kind == "apex_adamw" and config.zero.stage == 3:
        yield (
            "optim.kind=apex_adamw counts a step at each call, and zero.stage=3 calls it several times a step; "
            "use fused_adamw, or zero.stage 0, 1 or 2"
        )


@rule("optim.state_dtype", "optim.kind", "optim.momentum")
def _there_is_a_state_to_narrow(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if optim.state_dtype is None:
        return
    why = {
        "adafactor": "keeps hardly any state",
        "muon": "works on whole matrices, not on pieces, and keeps one number a weight of them as it is",
        "adamw8bit": "has a format of its own",
        "apex_adamw": "has a kernel that reads fp32",
    }.get(optim.kind)
    if optim.kind == "sgd" and not optim.momentum:
        why = "keeps no state without optim.momentum"
    if why is not None:
        yield (
            f"optim.state_dtype={optim.state_dtype} does not work with optim.kind={optim.kind}, which {why}; "
            f"use {_TORCHS}, or leave it out"
        )
