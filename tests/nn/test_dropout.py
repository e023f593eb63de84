"""Dropout masks are slices of one logical mask, whoever draws them."""

from __future__ import annotations

import torch

from megalm.nn.dropout import Dropout, DropoutKeys

SHAPE = (6, 10, 7)
ONES = torch.ones(SHAPE, dtype=torch.float64)
KEYS = DropoutKeys(seed=3, step=5, first_sample=0)


def whole_mask(site: str = "blocks.0.mlp", rate: float = 0.4, keys: DropoutKeys = KEYS) -> torch.Tensor:
    return Dropout(site, rate)(ONES, keys, 0, SHAPE[1])


def test_masks_of_microbatches_and_token_shards_are_slices_of_the_whole_mask() -> None:
    dropout, whole = Dropout("blocks.0.mlp", 0.4), whole_mask()
    for first_sample in range(0, 6, 2):
        for first_token in (0, 5):
            keys = DropoutKeys(3, 5, first_sample)
            part = dropout(ONES[:2, :5], keys, first_token, 10)
            assert torch.equal(part, whole[first_sample : first_sample + 2, first_token : first_token + 5])


def test_masks_of_heads_are_slices_of_the_whole_mask() -> None:
    dropout, shape = Dropout("blocks.0.attention.probabilities", 0.4), (4, 6, 5, 5)
    whole = dropout.scale(KEYS, shape, (0, 0, 0, 0), shape, ONES)
    for first_sample, first_head in ((0, 0), (2, 2), (3, 4)):
        lengths = (1, 2, 5, 5)
        # The whole tensor's first dim may be cut anywhere: the mask does not depend on it.
        part = dropout.scale(KEYS, (first_sample + 1, 6, 5, 5), (first_sample, first_head, 0, 0), lengths, ONES)
        assert torch.equal(part, whole[first_sample : first_sample + 1, first_head : first_head + 2])


def test_kept_elements_are_scaled_and_about_the_rate_is_dropped() -> None:
    mask = Dropout("embedding", 0.25)(torch.ones(40, 50, 10), KEYS, 0, 50)
    assert mask.unique().tolist() == [0.0, torch.tensor(1.0 / 0.75).item()]
    assert abs((mask == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / mask.numel()) ** 0.5  # five deviations


def test_without_keys_or_at_rate_0_the_input_itself_comes_back() -> None:
    assert Dropout("embedding", 0.5)(ONES, None, 0, 10) is ONES
    assert Dropout("embedding", 0.0)(ONES, KEYS, 0, 10) is ONES


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
        assert Dropout("embedding", 0.5)(ONES.to(dtype), KEYS, 0, 10).dtype is dtype
