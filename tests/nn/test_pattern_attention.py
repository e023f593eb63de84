"""Attention by blocks against the whole matrix of scores in float64, which hides what the pattern hides.

Summaries are columns of that matrix, in front: made, seen and placed here one block at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.patterns import BlockPattern
from megalm.kernels import reference
from megalm.nn.entropy import head_entropy
from megalm.nn.masks import Documents, Drop, DropoutKeys, Site
from megalm.nn.pattern_attention import pattern_attention

ROWS, HEADS, GROUPS, SIZE = 2, 4, 2, 8
PATTERNS = [
    BlockPattern(4, 2),
    BlockPattern(2, 1, 3),
    BlockPattern(4, 2, 3, 5),
    BlockPattern(1, 3, 4, 1),
    BlockPattern(16, 1, None, 2),
]
SUMMARIES = [BlockPattern(size, local, summaries=True) for size, local in ((4, 2), (2, 1), (5, 3), (16, 1))]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes_H": torch.linspace(0.1, 1.0, HEADS, dtype=torch.float64)},
    "bias": {"bias_HTS": True},
    "drop": {"drop": Drop(0.3, Site("blocks.1"), DropoutKeys(5, 2, first_sample=3), 4, 8)},
    "documents": {"documents": True},
    "lse": {"return_lse": True},
}
OPTIONS["all"] = {key: value for part in OPTIONS.values() for key, value in part.items()}


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, tokens, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def options(name: str, tokens: int) -> dict[str, Any]:
    how = dict(OPTIONS[name])
    if "bias_HTS" in how:
        how["bias_HTS"] = torch.randn(HEADS, tokens, tokens, dtype=torch.float64).requires_grad_()
    if "documents" in how:
        how["documents"] = Documents(torch.tensor([0, 1])[:, None] + torch.arange(tokens) // 7)
    return how


def seen(pattern: BlockPattern, t: int, s: int) -> bool:
    own, other = t // pattern.block, s // pattern.block
    strides = range(own, -1, -pattern.stride) if pattern.stride else ()
    return s <= t and (other in range(own - pattern.local + 1, own + 1) or other in strides or s < pattern.first)


def matrix_columns(x: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys or values with the summaries in front, bool [T, S] that says which are seen, and their places."""
    tokens = x.shape[1]
    visible = torch.tensor([[seen(pattern, t, s) for s in range(tokens)] for t in range(tokens)])
    places = torch.arange(tokens, dtype=torch.float64)
    for first in range(0, tokens - pattern.block + 1, pattern.block) if pattern.summaries else ():
        block = slice(first, first + pattern.block)
        x = torch.cat((x[:, -tokens:][:, block].mean(1, keepdim=True), x), dim=1)
        places = torch.cat((places[-tokens:][block].mean()[None], places))
        local = [max(0, t // pattern.block - pattern.local + 1) * pattern.block for t in range(tokens)]
        summed = torch.tensor([first + pattern.block <= start for start in local])
        visible = torch.cat((summed[:, None], visible), dim=1)
    return x, visible, places


def whole_matrix(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, how: dict[str, Any]) -> Any:
    tokens, how = q.shape[1], dict(how)
    drop, documents, slopes = how.pop("drop", None), how.pop("documents", None), how.pop("slopes_H", None)
    (k, visible, places), (v, _, _) = (matrix_columns(x, pattern) for x in (k, v))
    visible = visible[None]
    if documents is not None:
        visible = visible & documents.visible_BTS
    dropping = {} if drop is None else {"dropout": drop.rate, "seed": drop.stream, "dropout_origin": drop.origin}
    if slopes is not None:
        bias = -slopes[:, None, None] * (torch.arange(tokens)[:, None] - places).abs()
        how["bias_HTS"] = bias + how.get("bias_HTS", 0.0)
    return reference.flash_attention(q, k, v, causal=False, visible_BTS=visible, **dropping, **how)


def held_to_the_whole_matrix(tokens: int, pattern: BlockPattern, how: dict[str, Any]) -> None:
    """Compare results and gradients, with those of a bias."""
    found, leaves = [], [*inputs(tokens), *([how["bias_HTS"]] if "bias_HTS" in how else [])]
    for result in (
        pattern_attention(*leaves[:3], pattern=pattern, causal=True, **how),
        whole_matrix(*leaves[:3], pattern, how),
    ):
        parts = result if isinstance(result, tuple) else (result,)
        total = sum(
            (part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in parts
        )
        found.append([*parts, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [48, 37])
def test_blocks_give_what_the_whole_matrix_gives(tokens: int, pattern: BlockPattern, name: str) -> None:
    held_to_the_whole_matrix(tokens, pattern, options(name, tokens))


WITHOUT_SUMMARIES = {"bias_HTS", "documents"}


@pytest.mark.parametrize("name", ["plain", "softcap", "slopes", "drop", "lse", "all"])
@pytest.mark.parametrize("pattern", SUMMARIES, ids=str)
@pytest.mark.parametrize("tokens", [48, 37, 3])
def test_summaries_are_keys_and_values_in_front(tokens: int, pattern: BlockPattern, name: str) -> None:
    how = {key: value for key, value in options(name, tokens).items() if key not in WITHOUT_SUMMARIES}
    held_to_the_whole_matrix(tokens, pattern, how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"softcap": 5.0, "return_lse": True}], ids=["plain", "capped"])
def test_summaries_in_a_narrow_dtype_are_as_near_as_it_rounds(dtype: torch.dtype, how: dict[str, Any]) -> None:
    """A mean, a score, a probability and a sum round once each, and values are of the size of 1."""
    q, k, v = (x.detach() for x in inputs(48))
    for pattern in SUMMARIES:
        exact, found = (
            pattern_attention(*(x.to(to) for x in (q, k, v)), pattern=pattern, causal=True, **how)
            for to in (torch.float64, dtype)
        )
        exact, found = (result[0] if isinstance(result, tuple) else result for result in (exact, found))
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("pattern", SUMMARIES, ids=str)
def test_no_token_sees_one_to_come(pattern: BlockPattern) -> None:
    q, k, v = inputs(37)
    out = pattern_attention(q, k, v, pattern=pattern, causal=True)
    for t in range(37):
        gradients = torch.autograd.grad(out[:, t].sum(), (k, v), retain_graph=True)
        for gradient in gradients:
            seen_T = gradient.abs().amax(dim=(0, 2, 3)) > 0
            assert seen_T.tolist() == [s <= t for s in range(37)] or t == 0  # one key alone has no say


@pytest.mark.parametrize("pattern", SUMMARIES, ids=str)
def test_an_entropy_counts_summaries(pattern: BlockPattern) -> None:
    q, k, _ = (x.detach() for x in inputs(37))
    slopes = torch.linspace(0.1, 1.0, HEADS, dtype=torch.float64)
    keys, visible, places = matrix_columns(k, pattern)
    scores = q[0, :, 3] @ keys[0, :, 1].T / SIZE**0.5 - slopes[3] * (torch.arange(37)[:, None] - places)
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    found = head_entropy(q, k, 3, pattern=pattern, slopes_H=slopes)
    assert found.item() == pytest.approx(torch.special.entr(p).sum(-1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_entropy_is_that_of_what_is_seen(pattern: BlockPattern) -> None:
    q, k, _ = (x.detach() for x in inputs(37))
    hidden = torch.tensor([[not seen(pattern, t, s) for s in range(37)] for t in range(37)])
    p = (q[0, :, 3] @ k[0, :, 1].T / SIZE**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    assert head_entropy(q, k, 3, pattern=pattern).item() == pytest.approx(torch.special.entr(p).sum(-1).mean().item())


def test_only_what_is_seen_is_gathered() -> None:
    pattern = BlockPattern(8, 2, 4, 3)
    for block in range(12):
        places = pattern.live_keys(block)
        inside = range(block * 8, block * 8 + 8)
        assert sorted(places) == [s for s in range(96) if any(seen(pattern, t, s) for t in inside)]
