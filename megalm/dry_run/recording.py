"""What a piece of work allocates and sends, seen from outside: one dispatch mode over torch's operations.

It sees collectives and messages as the operations that torch.distributed makes of them, so that ours, autograd's and
DeepSpeed's are seen alike, in a world that runs as in one that is pretended.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh, world_group

WORLD = "world"
MESSAGES = ("send", "receive")

_NAMED: tuple[Axis, ...] = (
    *("tensor", "context", "data", "replica", "expert", "expert_replica", "embedding", "pipeline", "model"),
)
"""Groups of the same ranks share one, which has the first name of these."""

_OPERATIONS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
}
"""torch 2.13's operations of the namespace c10d; a barrier moves nothing."""


class Call(NamedTuple):
    """A collective over a group, or a message. `elements` are those of the whole: gathered, or not yet scattered."""

    operation: str
    axis: str
    ranks: int
    elements: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole."""
        return self.elements * self.dtype.itemsize

    @property
    def sent(self) -> int:
        """Return the bytes that a rank of a ring sends for it (Thakur et al. 2005, section 4)."""
        share = self.nbytes - self.nbytes // self.ranks
        shares = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share, "all-to-all": share}
        return shares.get(self.operation, 0 if self.operation == "receive" else self.nbytes)


class Names:
    """The axes of a mesh's groups."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self._names = {world_group().group_name: WORLD}
        for axis in reversed(_NAMED):
            self._names[mesh.group(axis).group_name] = axis

    def of(self, group: dist.ProcessGroup) -> str:
        """Return the axis of a group, or what the group is described by."""
        return self._names.get(group.group_name) or str(group.group_desc)


class Recorder(TorchDispatchMode):
    """While entered, follows the bytes of storages that are made and still there, and notes calls of more than a rank.

    Tensors of `known`, such as weights, count nothing, nor do views of them. What an operation allocates for itself
    is not seen.
    """

    def __init__(self, names: Names, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = self.peak_where = ""
        """What is being done, as who records says; and when the peak was."""
        self.calls: list[Call] = []
        self._names = names
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._note_storage(tensor.untyped_storage(), 0)

    def take(self) -> list[Call]:
        """Return the calls since this was last called."""
        calls, self.calls = self.calls, []
        return calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._note(func.__name__.split(".")[0], args)
            return result
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        if storage._cdata not in self._sizes:
            self._note_storage(storage, storage.nbytes())

    def _note_storage(self, storage: Any, size: int) -> None:
        """Count a storage as so many bytes while it is there; another one may lie at its address afterwards."""
        self._sizes[storage._cdata] = size
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_where = self.now, self.where
        weakref.finalize(storage, self._gone, storage._cdata).atexit = False

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def _note(self, name: str, args: Any) -> None:
        operation, group = _OPERATIONS.get(name), _group_of(args)
        if operation is None or group is None or group.size() == 1:
            return
        sides = [[leaf for leaf in tree_leaves(side) if isinstance(leaf, Tensor)] for side in args[:2]]
        elements = max(sum(tensor.numel() for tensor in side) for side in sides)
        if name == "alltoall_base_" and sum(map(bool, args[4])) == 1:
            operation = "pass on"  # all of it to one neighbour, as in a ring of keys
        if elements:
            dtype = next(tensor.dtype for side in sides for tensor in side)
            # Messages of each kind have a group of their own, of all stages.
            axis = "pipeline" if operation in MESSAGES else self._names.of(group)
            self.calls.append(Call(operation, axis, group.size(), elements, dtype))


def _group_of(args: Any) -> dist.ProcessGroup | None:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except RuntimeError:  # an operation's ReduceOp
                continue
    return None
