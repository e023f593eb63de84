"""The entropy of a head's attention, against probabilities that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels import reference
from megalm.nn import entropy
from megalm.nn.entropy import head_entropy
from megalm.nn.masks import Documents

ROWS, TOKENS, HEADS, GROUPS, SIZE = 2, 24, 6, 3, 8
NUMBERS = torch.tensor([0, 1])[:, None] + torch.arange(TOKENS) // 7


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, TOKENS, HEADS, SIZE), (ROWS, TOKENS, GROUPS, SIZE)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes)
    return q, k


def written_out(q: Tensor, k: Tensor, head: int, **how: Any) -> float:
    documents = how.pop("documents", None)
    slopes, bias = how.get("slopes_H"), how.get("bias_HTS")
    scores = q[0, :, head] @ k[0, :, head // 2].T / SIZE**0.5
    scores = reference.biased_scores(
        scores[None, None], how.get("softcap"), None if slopes is None else slopes[head : head + 1],
        None if bias is None else bias[head : head + 1],
    )[0, 0]  # fmt: skip
    hidden = reference.hidden_keys(
        TOKENS, TOKENS, q.device, True, how.get("window"),
        visible_BTS=None if documents is None else documents.visible_BTS[:1],
    )  # fmt: skip
    p = scores.masked_fill(hidden.reshape(TOKENS, TOKENS), -torch.inf).softmax(-1)
    return float(-(p * torch.where(p > 0, p, 1.0).log()).sum(-1).mean())


@pytest.mark.parametrize("name", ["plain", "window", "softcap", "slopes", "bias", "documents", "all"])
def test_the_entropy_is_that_of_the_probabilities(name: str) -> None:
    bias = torch.randn(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "window": {"window": 5},
        "softcap": {"softcap": 1.5},
        "slopes": {"slopes_H": torch.linspace(0.1, 1.0, HEADS, dtype=torch.float64)},
        "bias": {"bias_HTS": bias},
        "documents": {"documents": Documents(NUMBERS)},
    }
    how = {key: value for part in options.values() for key, value in part.items()} if name == "all" else options[name]
    q, k = inputs()
    for head in (0, 3, 5):
        found = head_entropy(q, k, head, causal=True, drop=None, return_lse=False, **how)
        assert found.item() == pytest.approx(written_out(q, k, head, **how), rel=1e-12)


def test_a_row_of_padding_has_a_number() -> None:
    assert head_entropy(*inputs(), 0, queries=0).item() == head_entropy(*inputs(), 0, queries=1).item() == 0.0


def test_of_a_long_row_some_queries_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 3000, 2, 8, generator=generator) for _ in range(2))
    some = head_entropy(q, k, 1)
    monkeypatch.setattr(entropy, "QUERIES", 3000)
    assert some.item() == pytest.approx(head_entropy(q, k, 1).item(), rel=0.01)
