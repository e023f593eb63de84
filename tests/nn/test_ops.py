"""The operations that the model calls are those of the oracle where there is no fused kernel."""

from __future__ import annotations

import torch
from megalm.kernels import reference

from megalm.nn import ops
from tests.shards import assert_close


def test_every_operation_agrees_with_the_oracle_of_its_name_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    table = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    arguments = {
        "apply_rotary": ((x, table, table + 1.0), {}),
        "flash_attention": ((x, y, z), {"causal": True}),
        "gelu": ((x,), {}),
        "layer_norm": ((x, table[0], table[1]), {"eps": 0.1}),
        "rms_norm": ((x, table[0]), {"eps": 0.1}),
        "swiglu": ((x, y), {}),
    }
    assert sorted(arguments) == sorted(ops.__all__)
    for name, (tensors, options) in arguments.items():
        assert_close(getattr(ops, name)(*tensors, **options), getattr(reference, name)(*tensors, **options), name)
