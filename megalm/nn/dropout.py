"""Dropout whose mask depends on the seed, the step, the site's name and global indices only.

A mask is therefore the same under every layout, and a recomputed or resumed forward pass draws it again exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.distributed.random import keep_slice, key


@dataclass(frozen=True)
class DropoutKeys:
    """What a forward pass must know to draw its masks.

    `first_sample` is the index within the step's global batch of the first row of this microbatch.
    """

    seed: int
    step: int
    first_sample: int


@dataclass(frozen=True)
class Dropout:
    """Drop elements at one named site of the model with probability `rate`."""

    site: str
    rate: float

    def scale(
        self,
        keys: DropoutKeys,
        global_shape: tuple[int, ...],
        starts: tuple[int, ...],
        lengths: tuple[int, ...],
        like: Tensor,
    ) -> Tensor:
        """Return the multipliers, 0 or 1 / (1 - rate), of the slice [starts, starts + lengths) of the site's tensor.

        They are fp32, or wider where `like` is. The site's whole tensor has the shape `global_shape`, whose first dim
        counts samples of the global batch.
        """
        stream = key(keys.seed, "dropout", self.site, keys.step)
        kept = keep_slice(stream, self.rate, global_shape, starts, lengths, like.device)
        return kept.to(torch.promote_types(like.dtype, torch.float32)).mul_(1.0 / (1.0 - self.rate))

    def __call__(self, x_BTD: Tensor, keys: DropoutKeys | None, first_token: int, tokens: int) -> Tensor:
        """Drop elements of x_BTD, which holds tokens `first_token` ... of sequences of `tokens` tokens.

        Without keys (evaluation) or at rate 0 x_BTD itself is returned.
        """
        if keys is None or self.rate == 0.0:
            return x_BTD
        rows, length, hidden = x_BTD.shape
        scale_BTD = self.scale(
            keys,
            (keys.first_sample + rows, tokens, hidden),
            (keys.first_sample, first_token, 0),
            (rows, length, hidden),
            x_BTD,
        )
        return (x_BTD * scale_BTD).to(x_BTD.dtype)
