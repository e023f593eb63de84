"""Collectives over a group that is passed in: those that autograd sees, and those that it does not.

None changes its input, all take non-contiguous input, and a group of one rank gives the input itself back. Sums run
in the dtype of the tensor: cast before where more digits are needed.
Every rank of the group must call, forward and backward.
Source: Shoeybi et al. 2019, section 3 (f and g); Korthikanti et al. 2022, section 4.2 (g and g-bar over the sequence).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm import errors

_REPORT_BYTES = 8192


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x; the backward pass sums its gradient over `group`.

    Stands where a tensor that all ranks hold alike enters work that is split over them. Any shape.
    """
    return x if group.size() == 1 else _Copy.apply(x, group)


def sum_gradient(parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a parameter that each rank applies to its own shard of the tokens; its gradient is summed over `group`."""
    return copy_to_group(parameter, group)


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over `group`; the backward pass hands the gradient through. Any shape.

    The gradient must be the same on all ranks, as it is where they go on with the same computation.
    """
    return x if group.size() == 1 else _Reduce.apply(x, group)


def gather_sequence(x_BTtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x_BTD, the ranks' tokens joined along dim 1; the backward pass sums the gradient and splits it.

    For a consumer that is split over the group, whose ranks each hold a part of the gradient's sum.
    """
    return x_BTtD if group.size() == 1 else _GatherSequence.apply(x_BTtD, group)


def reduce_scatter_sequence(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's tokens, dim 1, of the sum of x over `group`; the backward pass joins the gradients."""
    return x_BTD if group.size() == 1 else _ReduceScatterSequence.apply(x_BTD, group)


def exchange_blocks(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the blocks that the ranks have for this one, in their order, along dim 0; `blocks` has one for each rank.

    The backward pass sends the gradients back.
    """
    each = [len(blocks) // group.size()] * group.size()
    return exchange_rows(blocks.contiguous(), each, each, group)


def exchange_rows(x_ND: Tensor, sent: Sequence[int], came: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows that the ranks of `group` have for this one, in their order; the gradient goes the way back.

    `sent` of this rank's rows, in order, go to each rank, and `came` are as many as come from each.
    """
    return x_ND if group.size() == 1 else _ExchangeRows.apply(x_ND, sent, came, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over `group`, outside of autograd."""
    return x.detach() if group.size() == 1 else _sum(x.detach(), group)


def all_reduce_max(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the elementwise maximum of x over `group`, outside of autograd."""
    if group.size() == 1:
        return x.detach()
    result = _copy_of(x.detach())
    dist.all_reduce(result, dist.ReduceOp.MAX, group=group)
    return result


def agree(error: BaseException | None, group: dist.ProcessGroup) -> None:
    """Raise on all ranks of `group` if any of them has an error; return if none has.

    Every rank raises the class and the message of the lowest failing rank, with its number: a UserError stays one, and
    what is no MegalmError becomes a DistributedError. In a group of one the error is raised as it is.
    Uses CPU tensors, so the group needs a CPU back end; costs one small all-reduce when nothing is wrong.
    """
    if group.size() == 1:
        if error is not None:
            raise error
        return
    first = torch.tensor([group.size() if error is None else group.rank()])
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    failed = int(first.item())
    if failed == group.size():
        return
    report = torch.zeros(_REPORT_BYTES, dtype=torch.uint8)
    if group.rank() == failed:
        assert error is not None
        text = json.dumps(describe(error)).encode()
        report[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rank = dist.get_global_rank(group, failed)
    dist.broadcast(report, rank, group=group)
    name, message = json.loads(bytes(report.tolist()).rstrip(b"\0"))
    raise getattr(errors, name)(f"rank {rank}: {message}") from error


def describe(error: BaseException) -> tuple[str, str]:
    """Return the name of a class in megalm.errors, and the message in one line, short enough to send."""
    kind = next((base for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base), None)
    message = " ".join(str(error).split())
    if kind is None:
        kind, message = errors.DistributedError, f"{type(error).__name__}: {message}"
    # JSON writes a character in at most 12 bytes (two escaped surrogates).
    return kind.__name__, message[: (_REPORT_BYTES - 100) // 12]


def _copy_of(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = _copy_of(x)
    dist.all_reduce(result, group=group)
    return result


def _gather(x_BTtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    batch, tokens, *rest = x_BTtD.shape
    count = group.size()
    parts = x_BTtD.new_empty((count * batch, tokens, *rest))
    dist.all_gather_into_tensor(parts, x_BTtD.contiguous(), group=group)
    return parts.unflatten(0, (count, batch)).transpose(0, 1).reshape(batch, count * tokens, *rest)


def _reduce_scatter(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    count = group.size()
    tokens = _shard_length(x_BTD, group)
    parts = _copy_of(x_BTD.unflatten(1, (count, tokens)).transpose(0, 1))
    result = x_BTD.new_empty((x_BTD.shape[0], tokens, *x_BTD.shape[2:]))
    dist.reduce_scatter_tensor(result, parts.flatten(0, 1), group=group)
    return result


def _exchange(x_ND: Tensor, sent: Sequence[int], came: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    result = x_ND.new_empty((sum(came), *x_ND.shape[1:]))
    dist.all_to_all_single(result, x_ND.contiguous(), list(came), list(sent), group=group)
    return result


def _shard_length(x_BTD: Tensor, group: dist.ProcessGroup) -> int:
    tokens, rest = divmod(x_BTD.shape[1], group.size())
    assert rest == 0, f"{x_BTD.shape[1]} tokens do not divide over a group of {group.size()}"
    return tokens


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTtD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_BTtD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTD: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradient_BTD, ctx.group), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x_BTD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTtD: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient_BTtD, ctx.group), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent: Sequence[int], came: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.came, ctx.group = sent, came, group
        return _exchange(x_ND, sent, came, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient_ND, ctx.came, ctx.sent, ctx.group), None, None, None


def copy_from_first(x: Tensor, group: dist.ProcessGroup) -> None:
    """Overwrite x by that of the group's first rank: sums of other groups, in an order of their own, become one."""
    if group.size() > 1:
        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
