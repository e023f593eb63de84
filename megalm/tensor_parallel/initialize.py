"""Parameters whose first values depend on the seed, their logical name and their global indices alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from megalm.distributed.random import key, normal_shard
from megalm.distributed.sharding import ShardSpec


@dataclass(frozen=True)
class Initializer:
    """Makes parameters of one dtype on one device; the same logical values under every layout.

    `kind` is how matrices are drawn: "normal" or "truncated_normal" (within 3 deviations) with a given deviation, or
    normal with that of "xavier", sqrt(2 / (in + out)) (Glorot and Bengio 2010), or of "he", sqrt(2 / in) (He et al.
    2015). Every parameter it returns carries its `ShardSpec` as `parameter.shard`.
    """

    seed: int
    dtype: torch.dtype
    device: torch.device
    kind: str = "normal"

    def table(self, spec: ShardSpec, std: float) -> nn.Parameter:
        """Return this rank's shard of a logical table whose rows are looked up, of deviation `std`; padding is zero."""
        truncated = self.kind == "truncated_normal"
        stream = key(self.seed, "init", spec.name)
        return _with_shard(normal_shard(spec, stream, std, self.dtype, self.device, truncated), spec)

    def matrix(self, spec: ShardSpec, std: float, shrink: float = 1.0) -> nn.Parameter:
        """Return this rank's shard of a logical matrix [..., out, in] of `kind`, times `shrink`; padding is zero.

        `std` is the deviation of those kinds that take one.
        """
        rows, columns = spec.global_shape[-2:]
        deviations = {"xavier": math.sqrt(2.0 / (rows + columns)), "he": math.sqrt(2.0 / columns)}
        return self.table(spec, deviations.get(self.kind, std) * shrink)

    def constant(self, spec: ShardSpec, value: float) -> nn.Parameter:
        """Return this rank's shard of a logical tensor that holds `value` everywhere; padding too."""
        values = torch.full(spec.local_shape, value, dtype=self.dtype, device=self.device)
        return _with_shard(values, spec)


def _with_shard(values: torch.Tensor, spec: ShardSpec) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.shard = spec  # type: ignore[attr-defined]
    return parameter
