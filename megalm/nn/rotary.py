"""The tables of rotary positions, and how their frequencies are scaled for texts longer than those of the training.

    angle of pair j at position t = t f_j        f_j = base^(-2j/R) for the R features of a head that turn

linear (Chen et al. 2023): f / s for texts s times as long. ntk (bloc97 2023): the base becomes base s^(R/(R-2)), so
that the slowest pair turns s times slower and the fastest as before. yarn (Peng et al. 2023): pairs that turn fewer
than once over the original length are slowed by s, those that turn more than 32 times are not, those between are mixed;
queries and keys grow by 0.1 ln s + 1. llama3 (Grattafiori et al. 2024): likewise between 1 and 4 turns, mixed by turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megalm.config.model import ModelSection

_YARN_TURNS = (1.0, 32.0)
_LLAMA_TURNS = (1.0, 4.0)


def rotary_tables(config: ModelSection) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, fp64 [sequence, R], of the angles of the pairs (j, j + R/2)."""
    frequencies, growth = SCALINGS[config.rotary_scaling](config)
    angles = torch.arange(config.sequence, dtype=torch.float64)[:, None] * frequencies
    angles_TR = torch.cat((angles, angles), dim=-1)
    return growth * angles_TR.cos(), growth * angles_TR.sin()


def _frequencies(config: ModelSection, base: float | None = None) -> Tensor:
    size = config.rotary_size
    return (config.rotary_base if base is None else base) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def _plain(config: ModelSection) -> tuple[Tensor, float]:
    return _frequencies(config), 1.0


def _linear(config: ModelSection) -> tuple[Tensor, float]:
    return _frequencies(config) / config.rotary_factor, 1.0


def _ntk(config: ModelSection) -> tuple[Tensor, float]:
    size = config.rotary_size
    return _frequencies(config, config.rotary_base * config.rotary_factor ** (size / max(size - 2, 1))), 1.0


def _yarn(config: ModelSection) -> tuple[Tensor, float]:
    """Mix by the pair's number, between those whose turns over the original length are the two bounds."""
    length, size, base = config.rotary_original, config.rotary_size, config.rotary_base
    assert length is not None

    def pair_of(turns: float) -> float:
        return size * math.log(length / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    low = max(math.floor(pair_of(_YARN_TURNS[1])), 0)
    high = min(math.ceil(pair_of(_YARN_TURNS[0])), size - 1)
    slowed = ((torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    frequencies = _frequencies(config)
    return frequencies * (1.0 - slowed + slowed / config.rotary_factor), 0.1 * math.log(config.rotary_factor) + 1.0


def _llama3(config: ModelSection) -> tuple[Tensor, float]:
    """Mix by the turns over the original length."""
    assert config.rotary_original is not None
    frequencies = _frequencies(config)
    turns = config.rotary_original * frequencies / (2.0 * math.pi)
    least, most = _LLAMA_TURNS
    kept = ((turns - least) / (most - least)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / config.rotary_factor), 1.0


SCALINGS: dict[str, Callable[[ModelSection], tuple[Tensor, float]]] = {
    "none": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
}
"""What `model.rotary_scaling` chooses: the frequencies of the pairs, and the growth of queries and keys."""
