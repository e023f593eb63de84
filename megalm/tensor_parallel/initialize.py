"""Parameters whose first values depend on the seed, their logical name and their global indices alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megalm.distributed.random import key, normal_shard
from megalm.distributed.sharding import ShardSpec


@dataclass(frozen=True)
class Initializer:
    """Makes parameters of one dtype on one device; the same logical values under every layout.

    Every parameter it returns carries its `ShardSpec` as `parameter.shard`.
    """

    seed: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, spec: ShardSpec, std: float) -> nn.Parameter:
        """Return this rank's shard of a logical tensor drawn from normal(0, std); padding is zero."""
        values = normal_shard(spec, key(self.seed, "init", spec.name), std, self.dtype, self.device)
        return _with_shard(values, spec)

    def constant(self, spec: ShardSpec, value: float) -> nn.Parameter:
        """Return this rank's shard of a logical tensor that holds `value` everywhere; padding too."""
        values = torch.full(spec.local_shape, value, dtype=self.dtype, device=self.device)
        return _with_shard(values, spec)


def _with_shard(values: torch.Tensor, spec: ShardSpec) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.shard = spec  # type: ignore[attr-defined]
    return parameter
