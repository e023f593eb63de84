"""Distributions against a brute-force reading of their definitions; draws against the distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.errors import ConfigError, MegalmError
from megalm.generation.sampling import Sampling, draw_token, token_probabilities


def brute_force(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The definition, in plain Python: sort, cut at k, renormalise, cut at p, renormalise."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0.0:
        return [float(token == ranked[0]) for token in range(len(logits))]
    ranked = ranked[:top_k]
    weights = {token: math.exp((logits[token] - logits[ranked[0]]) / temperature) for token in ranked}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for token in ranked:
        if sum(kept.values()) >= top_p:
            break
        kept[token] = weights[token] / total
    if top_p == 1.0:
        kept = {token: weight / total for token, weight in weights.items()}
    mass = sum(kept.values())
    return [kept.get(token, 0.0) / mass for token in range(len(logits))]


# Multiples of 1/8: ties are common, and no cumulative sum falls within rounding of top_p.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)


@settings(deadline=None, database=None, derandomize=True)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 5, 50]),
    top_p=st.sampled_from([1e-9, 0.1234567, 0.5432167, 0.9123457, 1.0]),
)
def test_probabilities_are_those_of_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    got = token_probabilities(torch.tensor(logits), Sampling(temperature, top_k, top_p))
    expected = torch.tensor(brute_force(logits, temperature, top_k, top_p), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_top_p_keeps_the_token_that_reaches_the_share() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    kept = {
        p: int((token_probabilities(logits.double(), Sampling(top_p=p)) > 0).sum())
        for p in (0.3, 0.499, 0.501, 0.749, 0.751, 1.0)
    }
    assert kept == {0.3: 1, 0.499: 1, 0.501: 2, 0.749: 2, 0.751: 3, 1.0: 4}


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert [draw_token(logits, Sampling(temperature=0.0, seed=seed), 0) for seed in range(5)] == [1] * 5


def test_of_equal_logits_the_lower_tokens_are_kept() -> None:
    probabilities = token_probabilities(torch.zeros(100_000), Sampling(top_k=3))
    assert probabilities.nonzero().flatten().tolist() == [0, 1, 2]


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = torch.tensor([1000.0, 1001.0, -1000.0])
    assert token_probabilities(logits, Sampling(temperature=1e-300)).tolist() == [0.0, 1.0, 0.0]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -20.0])
    sampling = Sampling(temperature=1.3, top_k=3, seed=5)
    count = 4000
    drawn = torch.bincount(torch.tensor([draw_token(logits, sampling, n) for n in range(count)]), minlength=5).double()
    expected = token_probabilities(logits, sampling) * count
    assert drawn[1] == 0 and drawn[4] == 0
    kept = expected > 0
    chi_square = ((drawn - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 13.8  # the 0.999 quantile of two degrees of freedom


def test_a_draw_is_a_function_of_seed_and_number() -> None:
    logits = torch.zeros(1000)
    first = [draw_token(logits, Sampling(seed=1), n) for n in range(20)]
    torch.manual_seed(99)
    assert [draw_token(logits, Sampling(seed=1), n) for n in range(20)] == first
    assert [draw_token(logits, Sampling(seed=2), n) for n in range(20)] != first
    assert len(set(first)) > 15


def test_rounding_between_layouts_does_not_change_the_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, generator=generator)
    logits[7] = logits[3]  # a tie that rounding breaks either way
    noisy = logits + 1e-7 * torch.randn(500, generator=generator)
    sampling = Sampling(temperature=0.8, seed=3)
    changed = sum(draw_token(logits, sampling, n) != draw_token(noisy, sampling, n) for n in range(300))
    assert changed == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(MegalmError, match="not finite"):
        draw_token(torch.tensor([0.0, bad]), Sampling(), 0)


def test_a_token_that_is_masked_out_is_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert {draw_token(logits, Sampling(seed=seed), 0) for seed in range(50)} == {1}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_that_mean_nothing_are_config_errors(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**values)  # type: ignore[arg-type]
