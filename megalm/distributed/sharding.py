"""Which part of a logical, whole-model tensor a rank holds.

Every parameter carries a `ShardSpec` as `parameter.shard`. Initial weights, checkpoints and the gradient norm
read it; nothing else in the project knows how a tensor is split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class ShardSpec:
    """This rank's part of the logical tensor `name`.

    Along `dim` (None: the tensor is whole on every rank of the tensor axis) the rank holds
    `global[start : start + length]` at `local[0 : length]`; local indices from `length` on are padding and stay zero.
    Experts are divided over dim 0 besides.
    The last two dims are a matrix, those before them a batch; `interleaved` says that they are several matrices: the
    numbers of rows that belong to each of them in turn, over and over.
    """

    name: str
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    length: int = 0
    interleaved: tuple[int, ...] = ()
    first_expert: int | None = None
    """Where dim 0 counts experts that the expert axis divides: the first of the `local_shape[0]` held here."""

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> ShardSpec:
        """Return the spec of a tensor that every rank of the tensor axis holds whole."""
        return cls(name, shape, shape)

    @classmethod
    def split(cls, name: str, global_shape: tuple[int, ...], dim: int, index: int, count: int) -> ShardSpec:
        """Return shard `index` of `count` along `dim`; the last shards are padded where `count` does not divide."""
        rows = -(-global_shape[dim] // count)
        start = min(index * rows, global_shape[dim])
        length = min(rows, global_shape[dim] - start)
        local_shape = (*global_shape[:dim], rows, *global_shape[dim + 1 :])
        return cls(name, global_shape, local_shape, dim, start, length)

    def of_experts(self, index: int, count: int) -> ShardSpec:
        """Return the part of it that has share `index` of `count` of the experts, which dim 0 counts."""
        experts, rest = divmod(self.global_shape[0], count)
        assert rest == 0 and self.dim, f"{self}: {count} ranks do not divide the experts, or dim 0 is split already"
        return replace(self, local_shape=(experts, *self.local_shape[1:]), first_expert=index * experts)

    def renamed(self, name: str) -> ShardSpec:
        """Return the same part of a tensor of another name."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one tensor that a rank owns: weights, gradients or optimizer state.

    `values` (1-D) are the elements [start, start + len(values)) of the flattened local tensor of shape
    `shard.local_shape`. `kind` is "weight", "gradient", or the optimizer's name of a state, such as "exp_avg".
    """

    shard: ShardSpec
    kind: str
    start: int
    values: Tensor
