"""Planted faults in latent attention: what goes wrong where some projections are whole and others are split."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from megalm.config.model import ModelSection
from megalm.distributed.collectives import sum_gradient
from megalm.nn import latent_attention
from megalm.nn.latent_attention import LatentProjection
from tests.parity.cases import LATENT, MUON, SEQUENCE
from tests.parity.faults import Mutant, Patches, _identity
from tests.parity.harness import Case


def latents_have_the_gradient_of_one_ranks_heads() -> Patches:
    yield mock.patch.object(latent_attention, "shared_input", lambda x, origin, *_: (x, origin))


def projections_down_see_one_ranks_tokens() -> Patches:
    yield mock.patch.object(latent_attention, "sum_gradient", _identity)


def projections_down_are_summed_over_ranks_that_go_down_alike() -> Patches:
    def down(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        return self.linear(x, sum_gradient(weight, self.group))

    yield mock.patch.object(LatentProjection, "_down", down)


def latent_norms_see_one_ranks_tokens() -> Patches:
    original = latent_attention.RMSNorm.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **{**rest, "group": None})

    yield mock.patch.object(latent_attention.RMSNorm, "__init__", init)


def what_does_not_turn_is_turned() -> Patches:
    yield mock.patch.object(ModelSection, "rotary_size", property(lambda self: self.head_size // 2 * 2))


def latents_are_not_normed() -> Patches:
    original = LatentProjection.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        self.kv_latent_norm.forward = lambda x: x * self.kv_latent_norm.weight

    yield mock.patch.object(LatentProjection, "__init__", init)


def keys_and_values_of_a_latent_are_one_matrix() -> Patches:
    original = LatentProjection.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        weight = self.kv_up_weight
        weight.shard = latent_attention.replace(weight.shard, interleaved=())

    yield mock.patch.object(LatentProjection, "__init__", init)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(latents_have_the_gradient_of_one_ranks_heads, Case(1, 1, 2, LATENT)),
    Mutant(projections_down_see_one_ranks_tokens, Case(1, 1, 2, {**LATENT, **SEQUENCE})),
    Mutant(projections_down_are_summed_over_ranks_that_go_down_alike, Case(1, 1, 2, LATENT)),
    Mutant(latent_norms_see_one_ranks_tokens, Case(1, 1, 2, {**LATENT, **SEQUENCE})),
    Mutant(what_does_not_turn_is_turned, Case(1, 1, 1, LATENT)),
    Mutant(latents_are_not_normed, Case(1, 1, 1, LATENT)),
    Mutant(keys_and_values_of_a_latent_are_one_matrix, Case(1, 1, 1, {**LATENT, **MUON})),
)
