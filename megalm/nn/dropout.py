"""Dropout whose mask depends on the seed, the step, the site's name and global indices only.

A mask is therefore the same under every layout, and a recomputed or resumed forward pass draws it again exactly.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megalm.distributed.places import Places
from megalm.nn.masks import Drop, DropoutKeys, Site, kept


class Dropout:
    """Drop elements at one named site of the model with probability `rate`."""

    def __init__(self, site: str, rate: float) -> None:
        self.site, self.rate = Site(site), rate

    def at(self, keys: DropoutKeys | None, first: int, whole: int) -> Drop | None:
        """Return this forward pass's dropout of a tensor; None where nothing is dropped (no keys: evaluation).

        The tensor holds tokens (or heads) `first` ... of `whole` ones in dim 1 (see `Drop`).
        """
        if keys is None or self.rate == 0.0:
            return None
        return Drop(self.rate, self.site, keys, first, whole)

    def on(self, keys: DropoutKeys | None, places: Places, whole: int) -> Drop | None:
        """Return this forward pass's dropout of a tensor that holds tokens `places` of `whole` ones in dim 1."""
        drop = self.at(keys, places[0].first, whole)
        return drop if drop is None or len(places) == 1 else replace(drop, places=places)


class StochasticDepth:
    """Leave what a half of a block adds out for whole samples with probability `rate` (Huang et al. 2016)."""

    def __init__(self, site: str, rate: float) -> None:
        self.site, self.rate = Site(site), rate

    def __call__(self, y_BTD: Tensor, keys: DropoutKeys | None) -> Tensor:
        """Return y with some samples zeroed, the others scaled by 1 / (1 - rate); y itself in evaluation (no keys)."""
        if keys is None or self.rate == 0.0:
            return y_BTD
        kept_B = kept(keys, self.site, self.rate, (), (), y_BTD)
        return y_BTD * (kept_B.to(y_BTD.dtype) / (1.0 - self.rate))[:, None, None]
