"""What ranks tell each other beside tensors: small JSON values, and whether all went well.

Owns: moving JSON over a process group without pickle, and one error for all ranks. `group` None means that
this process is alone; a group needs a CPU back end. A thread beside the main one gives a `Meeting` instead. Every rank
of the group must call each of these functions.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megalm.distributed.collectives import agree
from megalm.distributed.meeting import Meeting

Group = dist.ProcessGroup | None
_LENGTH_BYTES = 8


def rank_of(group: Group | Meeting) -> int:
    """Return this process's rank in `group`."""
    return 0 if group is None else group.rank()


def size_of(group: Group | Meeting) -> int:
    """Return the number of ranks in `group`."""
    return 1 if group is None else group.size()


@contextmanager
def together(group: Group | Meeting) -> Iterator[None]:
    """Run a block on every rank; if it fails on any, raise that error on all of them, with the rank."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if isinstance(group, Meeting):
        group.agree(failure)
    elif group is not None:
        agree(failure, group)
    elif failure is not None:
        raise failure


def gather_json(value: Any, group: Group | Meeting) -> list[Any]:
    """Return the values of all ranks, in their order, on rank 0, and an empty list on the others."""
    if group is None or group.size() == 1:
        return [value]
    if isinstance(group, Meeting):
        return group.gather(value)
    data = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
    longest = torch.tensor([len(data)])
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    message = _padded(data, int(longest.item()))
    root = dist.get_global_rank(group, 0)
    if group.rank() != 0:
        dist.gather(message, None, dst=root, group=group)
        return []
    messages = [torch.empty_like(message) for _ in range(group.size())]
    dist.gather(message, messages, dst=root, group=group)
    return [json.loads(zlib.decompress(_unpadded(message))) for message in messages]


def gather_distinct(values: Mapping[str, Any], group: Group | Meeting) -> dict[str, Any]:
    """Return, on rank 0, what any rank has in `values` (JSON), each key once, and {} on the others.

    A key's values must be equal wherever it is there: of the ranks that have it, one sends it.
    """
    if group is None or group.size() == 1:
        return dict(values)
    if isinstance(group, Meeting):
        return group.gather_distinct(values)
    senders: dict[str, int] = {}
    for rank, keys in enumerate(gather_json(sorted(values), group)):
        for key in keys:
            senders.setdefault(key, rank)
    senders = broadcast_json(senders, group)
    root = dist.get_global_rank(group, 0)
    own = {key: value for key, value in values.items() if senders[key] == group.rank()}
    if group.rank() != 0:
        if own:
            message = _padded(zlib.compress(json.dumps(own).encode(), 1))
            dist.send(torch.tensor([len(message)]), root, group=group)
            dist.send(message, root, group=group)
        return {}
    for rank in sorted({*senders.values()} - {0}):
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, dist.get_global_rank(group, rank), group=group)
        message = torch.empty(int(length.item()), dtype=torch.uint8)
        dist.recv(message, dist.get_global_rank(group, rank), group=group)
        own |= json.loads(zlib.decompress(_unpadded(message)))
    return own


def broadcast_json(value: Any, group: Group) -> Any:
    """Return rank 0's value on every rank; the argument of the others is not looked at."""
    if group is None or group.size() == 1:
        return value
    root = dist.get_global_rank(group, 0)
    data = json.dumps(value).encode() if group.rank() == 0 else b""
    length = torch.tensor([len(data)])
    dist.broadcast(length, root, group=group)
    message = _padded(data, int(length.item()))
    dist.broadcast(message, root, group=group)
    return json.loads(_unpadded(message))


def _padded(data: bytes, length: int = 0) -> torch.Tensor:
    text = len(data).to_bytes(_LENGTH_BYTES, "little") + data
    return torch.frombuffer(bytearray(text.ljust(_LENGTH_BYTES + length, b"\0")), dtype=torch.uint8)


def _unpadded(message: torch.Tensor) -> bytes:
    data = message.numpy().tobytes()
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    return data[_LENGTH_BYTES : _LENGTH_BYTES + length]
