"""Planted faults in the prediction of further tokens: what is shifted, what is shared, and what is divided by what."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalm.models import transformer
from megalm.models.transformer import Transformer
from megalm.nn import multi_token
from megalm.nn.multi_token import TokenJoin
from tests.parity.cases import AHEAD, SEQUENCE, UNTIED
from tests.parity.faults import Mutant, Patches, _identity
from tests.parity.harness import Case


def further_tokens_are_those_of_the_row_s_begin() -> Patches:
    yield mock.patch.object(transformer, "tokens_ahead", lambda x_BT, count: x_BT.roll(-count, dims=1))


def the_end_of_a_row_has_a_further_loss() -> Patches:
    original = transformer.tokens_ahead
    yield mock.patch.object(
        transformer, "tokens_ahead", lambda x, count: x if x.dtype is torch.bool else original(x, count)
    )


def the_embedded_token_is_the_one_to_be_predicted() -> Patches:
    original = Transformer._loss_sum_ahead

    def ahead(self: Any, x: Tensor, *places: Any) -> Tensor:
        *more, _, labels, mask = places
        return original(self, x, *more, labels, labels, mask)

    yield mock.patch.object(Transformer, "_loss_sum_ahead", ahead)


def losses_of_depths_are_summed() -> Patches:
    original = Transformer._loss_sum_ahead
    yield mock.patch.object(Transformer, "_loss_sum_ahead", lambda self, *rest: len(self.ahead) * original(self, *rest))


def every_depth_is_given_the_model_s_hidden_state() -> Patches:
    original, first = TokenJoin.forward, {}

    def forward(self: Any, x: Tensor, embedded: Tensor) -> Tensor:
        if ".4." in self.project_weight.shard.name:
            first["x"] = x
        return original(self, first["x"], embedded)

    yield mock.patch.object(TokenJoin, "forward", forward)


def the_join_sees_one_ranks_tokens() -> Patches:
    yield mock.patch.object(multi_token, "sum_gradient", _identity)


def the_copy_of_an_untied_embedding_goes_its_own_way() -> Patches:
    yield mock.patch.object(Transformer, "tied_weight", None)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(further_tokens_are_those_of_the_row_s_begin, Case(1, 1, 1, AHEAD)),
    Mutant(the_end_of_a_row_has_a_further_loss, Case(1, 1, 1, AHEAD)),
    Mutant(the_embedded_token_is_the_one_to_be_predicted, Case(1, 1, 1, AHEAD)),
    Mutant(losses_of_depths_are_summed, Case(1, 1, 1, AHEAD)),
    Mutant(every_depth_is_given_the_model_s_hidden_state, Case(1, 1, 1, AHEAD)),
    Mutant(the_join_sees_one_ranks_tokens, Case(1, 1, 2, {**AHEAD, **SEQUENCE})),
    Mutant(the_copy_of_an_untied_embedding_goes_its_own_way, Case(2, 1, 1, {**AHEAD, **UNTIED})),
)
