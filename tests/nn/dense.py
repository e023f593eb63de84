"""The layers of a block as formulas over whole weights by logical name, in float64: what the layers are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.nn.masks import DropoutKeys
from tests.parity.reference import dropped
from tests.parity.reference_model import Formulas, Weights


def formulas(config: ModelSection, w: Weights, keys: DropoutKeys | None = None) -> Formulas:
    """Return the reference model's layers; with `keys` its rows are samples first_sample ... of a global batch."""

    def drop(x: Tensor, site: str, rate: float, dims: int) -> Tensor:
        if keys is None or rate == 0.0:
            return x
        mask = torch.ones(x.shape[:dims], dtype=x.dtype)
        parts = (keys.seed, "dropout", site, keys.step)
        mask = dropped(mask, rate, parts, keys.first_sample, keys.first_sample + len(x))
        return x * mask.view(*mask.shape, *(1,) * (x.dim() - dims))

    return Formulas(config, w, torch.float64, drop)
