"""Dropout masks are slices of one logical mask, whoever draws them."""

from __future__ import annotations

import torch

from megalm.nn.dropout import Dropout
from megalm.nn.masks import DropoutKeys
from megalm.nn.ops import REFERENCE

SHAPE = (6, 10, 7)
ONES = torch.ones(SHAPE, dtype=torch.float64)
KEYS = DropoutKeys(seed=3, step=5, first_sample=0)


def dropped(dropout: Dropout, x: torch.Tensor, keys: DropoutKeys | None, first: int, whole: int) -> torch.Tensor:
    return REFERENCE.dropout(x, drop=dropout.at(keys, first, whole))


def whole_mask(site: str = "blocks.0.mlp", rate: float = 0.4, keys: DropoutKeys = KEYS) -> torch.Tensor:
    return dropped(Dropout(site, rate), ONES, keys, 0, SHAPE[1])


def test_masks_of_microbatches_and_token_shards_are_slices_of_the_whole_mask() -> None:
    dropout, whole = Dropout("blocks.0.mlp", 0.4), whole_mask()
    for first_sample in range(0, 6, 2):
        for first_token in (0, 5):
            keys = DropoutKeys(3, 5, first_sample)
            part = dropped(dropout, ONES[:2, :5], keys, first_token, 10)
            assert torch.equal(part, whole[first_sample : first_sample + 2, first_token : first_token + 5])


def test_masks_of_heads_are_slices_of_the_whole_mask() -> None:
    """With equal scores every probability is 1 / T: the output shows which were dropped."""
    dropout, (samples, heads, tokens) = Dropout("blocks.0.attention.probabilities", 0.4), (4, 6, 5)

    def attend(first_sample: int, first_head: int, rows: int, heads_here: int) -> torch.Tensor:
        zeros = torch.zeros(rows, tokens, heads_here, 1, dtype=torch.float64)
        value = (2.0 ** torch.arange(tokens, dtype=torch.float64)).view(1, tokens, 1, 1).expand_as(zeros)
        drop = dropout.at(DropoutKeys(3, 5, first_sample), first_head, heads)
        return REFERENCE.flash_attention(zeros, zeros, value, causal=False, drop=drop)

    whole = attend(0, 0, samples, heads)
    for first_sample, first_head in ((0, 0), (2, 2), (3, 4)):
        part = attend(first_sample, first_head, 1, 2)
        assert torch.equal(part, whole[first_sample : first_sample + 1, :, first_head : first_head + 2])


def test_kept_elements_are_scaled_and_about_the_rate_is_dropped() -> None:
    mask = dropped(Dropout("embedding", 0.25), torch.ones(40, 50, 10), KEYS, 0, 50)
    assert mask.unique().tolist() == [0.0, torch.tensor(1.0 / 0.75).item()]
    assert abs((mask == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / mask.numel()) ** 0.5  # five deviations


def test_without_keys_or_at_rate_0_the_input_itself_comes_back() -> None:
    assert dropped(Dropout("embedding", 0.5), ONES, None, 0, 10) is ONES
    assert dropped(Dropout("embedding", 0.0), ONES, KEYS, 0, 10) is ONES


def test_site_step_and_seed_each_give_another_mask() -> None:
    others = [
        whole_mask(site="blocks.1.mlp"),
        whole_mask(keys=DropoutKeys(3, 6, 0)),
        whole_mask(keys=DropoutKeys(4, 5, 0)),
    ]
    assert torch.equal(whole_mask(), whole_mask())
    for other in others:
        assert abs((other == whole_mask()).double().mean() - (0.4**2 + 0.6**2)) < 0.15  # independent masks


def test_a_mask_has_the_dtype_of_its_input() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert dropped(Dropout("embedding", 0.5), ONES.to(dtype), KEYS, 0, 10).dtype is dtype
