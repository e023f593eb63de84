"""Copies of what is saved: they hold while the tensors change, in the same memory each time."""

from __future__ import annotations

import pytest
import torch

from megalm.checkpoint import snapshot as module
from megalm.checkpoint.snapshot import RESERVE_BYTES, Snapshot
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import OutOfMemory

SPEC = ShardSpec.whole("x.weight", (4, 8))


def fragments(values: torch.Tensor) -> list[Fragment]:
    flat = values.flatten()
    return [
        Fragment(SPEC, "weight", 0, flat[:20]),
        Fragment(SPEC, "weight", 20, flat[20:]),
        Fragment(SPEC, "exp_avg", 0, flat.bfloat16()),
        Fragment(ShardSpec.whole("y", (0,)), "weight", 0, flat[:0]),
    ]


def test_a_copy_holds_while_the_tensors_change() -> None:
    values, snapshot = torch.arange(32.0).reshape(4, 8), Snapshot()
    copies = snapshot.take(iter(fragments(values)))
    snapshot.settle()
    snapshot.ready()
    values.zero_()
    assert [(c.shard.name, c.kind, c.start, c.values.dtype) for c in copies] == [
        (f.shard.name, f.kind, f.start, f.values.dtype) for f in fragments(values)
    ]
    assert torch.equal(torch.cat([copies[0].values, copies[1].values]), torch.arange(32.0))
    assert torch.equal(copies[2].values, torch.arange(32.0).bfloat16())


def test_memory_is_that_of_one_snapshot_and_stays() -> None:
    values, snapshot = torch.arange(32.0).reshape(4, 8).requires_grad_(), Snapshot()
    first = {c.values.data_ptr() for c in snapshot.take(fragments(values)) if c.values.numel()}
    assert snapshot.bytes == 32 * 4 + 32 * 2
    assert not any(copy.values.requires_grad for copy in snapshot.take(fragments(values)))
    assert {c.values.data_ptr() for c in snapshot.take(fragments(values)) if c.values.numel()} == first
    snapshot.take([Fragment(SPEC, "weight", 0, values.detach().flatten())])  # cut in another way: the rest is let go
    assert snapshot.bytes == 32 * 4
    (wide,) = snapshot.take([Fragment(SPEC, "weight", 0, values.detach().flatten().double())])
    assert wide.values.dtype == torch.float64 and torch.equal(wide.values, torch.arange(32.0).double())


def test_a_host_without_room_is_found_out_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 20
    parts = [Fragment(ShardSpec.whole(f"x{i}", (size,)), "weight", 0, torch.ones(size)) for i in range(3)]
    snapshot, free = Snapshot(), RESERVE_BYTES + 3 * 4 * size - 1
    monkeypatch.setattr(module, "free_host_bytes", lambda: free - snapshot.bytes)
    with pytest.raises(OutOfMemory, match="no room for a copy of what is saved: 515 MiB are free, 8 MiB are copied"):
        snapshot.take(parts)
    assert snapshot.bytes == 0
    free += 1
    assert len(snapshot.take(parts)) == 3
    free = 0
    assert len(snapshot.take(parts)) == 3, "nothing more is taken"
