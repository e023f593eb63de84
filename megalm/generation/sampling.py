"""Which token comes next, given the logits: greedy, temperature, top-k and top-p.

Owns the distribution and the draw. Random numbers are counter-based, a function of the seed and of how many
tokens were drawn before, so every rank and every layout draws the same token from the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.distributed.random import key, uniform_slice
from megalm.errors import ConfigError, MegalmError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` None and `top_p` 1 keep every token.

    Raises ConfigError for values that mean nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} is not a temperature; use 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} keeps no token; use 1 or more, or leave it out to keep all")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p} is not a share; use more than 0, and 1 to keep all tokens")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative; use 0 or more")


def token_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities that tokens are drawn with: float64 [V] on the CPU, their sum 1.

    The temperature divides the logits first (0: all weight on the largest). Then the `top_k` largest stay,
    and of these, renormalised, the smallest set of the most probable ones whose sum is at least `top_p`
    (Holtzman et al. 2020, section 3.1). Of equal logits the lower token counts as the larger. Raises
    MegalmError for NaN or +inf.
    """
    logits_V = logits_V.detach().to("cpu", torch.float64)
    if bool(torch.isnan(logits_V).any()) or not bool(torch.isfinite(logits_V.max())):
        raise MegalmError("the model's logits are not finite, so no token can be drawn; use an earlier checkpoint")
    order_V = torch.argsort(logits_V, descending=True, stable=True)
    if sampling.temperature == 0.0:
        return torch.zeros_like(logits_V).index_fill_(0, order_V[:1], 1.0)
    kept = order_V[: sampling.top_k]
    # The largest logit is taken off before the division: a temperature near 0 would overflow otherwise.
    probabilities = torch.softmax((logits_V[kept] - logits_V[order_V[0]]) / sampling.temperature, dim=0)
    if sampling.top_p < 1.0:
        before = torch.cumsum(probabilities, dim=0) - probabilities
        count = max(1, int((before < sampling.top_p).sum()))
        kept, probabilities = kept[:count], probabilities[:count] / probabilities[:count].sum()
    return torch.zeros_like(logits_V).index_copy_(0, kept, probabilities)


def draw_token(logits_V: Tensor, sampling: Sampling, draw: int) -> int:
    """Return the token number `draw` (from 0) of a text, given its logits, any float dtype [V].

    Inverts the cumulative distribution in the order of the token ids: rounding that differs between layouts
    then moves its steps by no more than itself, where an order by probability could swap two tokens.
    """
    probabilities_V = token_probabilities(logits_V, sampling)
    cumulative_V = torch.cumsum(probabilities_V, dim=0)
    # `right` passes over tokens of probability 0, whose step has no height.
    token = torch.searchsorted(cumulative_V, _uniform(sampling.seed, draw) * cumulative_V[-1], right=True)
    return min(int(token), int(probabilities_V.nonzero()[-1]))


def _uniform(seed: int, draw: int) -> float:
    """Return draw `draw` from [0, 1) with 48 random bits: 24 would never reach tokens rarer than 6e-8."""
    words = uniform_slice(key(seed, "sample", draw), (2,), (0,), (2,), torch.device("cpu")).tolist()
    return float(words[0] + words[1] * 2.0**-24)
