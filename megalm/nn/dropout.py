"""Dropout whose mask depends on the seed, the step, the site's name and global indices only.

A mask is therefore the same under every layout, and a recomputed or resumed forward pass draws it again exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.distributed.random import key
from megalm.nn.ops import Drop


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

    def at(self, keys: DropoutKeys | None, first: int, whole: int) -> Drop | None:
        """Return this forward pass's dropout of a tensor; None where nothing is dropped (no keys: evaluation).

        The tensor holds tokens (or heads) `first` ... of `whole` ones in dim 1 (see `Drop.origin`).
        """
        if keys is None or self.rate == 0.0:
            return None
        stream = key(keys.seed, "dropout", self.site, keys.step)
        return Drop(self.rate, stream, (keys.first_sample, first, whole))
