"""Ring attention: keys and values pass from rank to rank, and each adds what its own queries see of them.

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p        over the parts p of a row's keys

Tokens are those of `zigzag`: of a rank's two pieces of queries and two of keys that come by, causal attention leaves
two pairs visible at each step, three at the first, on every rank. A pair is a part of the row's matrix of scores, so
that windows, biases, documents and dropout are those of the whole. Of the forward pass a rank keeps its own queries,
keys, values, out and lse; in the backward pass keys and values go round once more, and their gradients with them.
Source: Liu et al. 2023 (ring attention); Brandon et al. 2023 (striped attention) for the balance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.distributed.places import Places, Run, pieces, zigzag
from megalm.nn.masks import Documents, Drop
from megalm.nn.ops import Operations


def ring_attention(
    operations: Operations,
    group: dist.ProcessGroup,
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    causal: bool,
    drop: Drop | None = None,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    documents: Documents | None = None,
    return_lse: bool = False,
) -> Any:
    """Return causal attention of this rank's tokens over whole rows as BTHE, with `return_lse` (out, lse_BHT).

    The arguments are those of `Operations.flash_attention`: q, k, v of this rank's tokens, `documents` of whole rows,
    `bias_HTS` of this rank's queries and all keys. Every rank of the context group must call, forward and backward.
    """
    assert causal, "a ring in zigzag order is for causal attention"
    options = {"drop": drop, "window": window, "softcap": softcap, "slopes_H": slopes_H}
    tokens = q_BTHE.shape[1] * group.size()
    ring = _Ring(operations, group, tokens, window, documents, options)
    out_BTHE, lse_BHT = _RingAttention.apply(q_BTHE, k_BTGE, v_BTGE, bias_HTS, ring)
    return (out_BTHE, lse_BHT) if return_lse else out_BTHE


@dataclass(frozen=True)
class _Ring:
    operations: Operations
    group: dist.ProcessGroup
    tokens: int
    window: int | None
    documents: Documents | None
    options: dict[str, Any]

    def places(self, step: int) -> Places:
        """Return the tokens of the keys that are here at a step: first a rank's own, then those from ever further."""
        ranks = self.group.size()
        return zigzag(self.tokens, (self.group.rank() - step) % ranks, ranks)

    def pairs(self, step: int) -> Iterator[tuple[int, int, dict[str, Any], Run]]:
        """Yield (which piece of queries, which of keys, arguments of the part, the keys) of what is visible."""
        for i, queries in enumerate(self.places(0)):
            for j, keys in enumerate(self.places(step)):
                nearest = queries.first - (keys.first + keys.length - 1)
                if keys.first <= queries.first and (self.window is None or nearest < self.window):
                    within = (queries.first, keys.first, self.tokens, self.tokens)
                    yield i, j, {"within": within, "documents": self._numbers(queries, keys)}, keys

    def _numbers(self, queries: Run, keys: Run) -> tuple[Tensor, Tensor] | None:
        if self.documents is None:
            return None
        numbers_BT = self.documents.numbers_BT
        return numbers_BT.narrow(1, *queries), numbers_BT.narrow(1, *keys)

    def pass_on(self, x: Tensor) -> _Passing:
        """Begin to send x, contiguous, to the next rank and to receive that of the one before, of the same shape.

        As one collective: NCCL runs messages of a group one after the other, so that in a circle all would send and
        none receive, and the watchdog counts collectives.
        """
        ranks, own = self.group.size(), self.group.rank()
        given, taken = [0] * ranks, [0] * ranks
        given[(own + 1) % ranks] = taken[(own - 1) % ranks] = len(x)
        received = torch.empty_like(x)
        work = dist.all_to_all_single(received, x, taken, given, group=self.group, async_op=True)
        assert work is not None, "this rank is not in the context group"
        return _Passing(x, received, work)


@dataclass(frozen=True)
class _Passing:
    sent: Tensor
    received: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """Return what was received."""
        self.work.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, bias_HTS: Tensor | None, ring: _Ring
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        merged: list[tuple[Tensor, Tensor] | None] = [None, None]
        queries = list(pieces(q_BTHE, ring.places(0)))
        here = torch.stack((k_BTGE, v_BTGE))
        for step in range(ring.group.size()):
            coming = ring.pass_on(here) if step + 1 < ring.group.size() else None
            keys, values = (list(pieces(x, ring.places(step))) for x in here)
            for i, j, part, k_places in ring.pairs(step):
                bias = _bias(bias_HTS, ring, i, k_places)
                found = ring.operations.partial_attention(
                    queries[i], keys[j], values[j], bias_HTS=bias, **part, **ring.options
                )
                merged[i] = _merge(merged[i], *found)
            here = here if coming is None else coming.wait()
        outs, lses = zip(*(both for both in merged if both is not None), strict=True)
        out_BTHE, lse_BHT = torch.cat(outs, dim=1).to(q_BTHE.dtype), torch.cat(lses, dim=2)
        ctx.ring = ring
        ctx.save_for_backward(q_BTHE, k_BTGE, v_BTGE, bias_HTS, out_BTHE, lse_BHT)
        return out_BTHE, lse_BHT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHE: Tensor | None, dlse_BHT: Tensor | None) -> tuple[Tensor | None, ...]:
        ring: _Ring = ctx.ring
        q_BTHE, k_BTGE, v_BTGE, bias_HTS, out_BTHE, lse_BHT = ctx.saved_tensors
        dout_BTHE = torch.zeros_like(out_BTHE) if dout_BTHE is None else dout_BTHE
        own, ranks = ring.places(0), ring.group.size()
        given = [dout_BTHE, out_BTHE, q_BTHE]
        douts, outs, queries = (list(pieces(x, own)) for x in given)
        lses = list(pieces(lse_BHT, own, dim=2))
        dlses = [None, None] if dlse_BHT is None else list(pieces(dlse_BHT, own, dim=2))
        wide = torch.promote_types(q_BTHE.dtype, torch.float32)
        dq = torch.zeros_like(q_BTHE, dtype=wide)
        dbias = None if bias_HTS is None else torch.zeros_like(bias_HTS)
        here = torch.stack((k_BTGE, v_BTGE))
        returning: _Passing | None = None
        for step in range(ranks):
            coming = ring.pass_on(here) if step + 1 < ranks else None
            places = ring.places(step)
            (keys, values), added = (list(pieces(x, places)) for x in here), torch.zeros_like(here, dtype=wide)
            dkeys, dvalues = (list(pieces(x, places)) for x in added)
            for i, j, part, k_places in ring.pairs(step):
                tensors = (douts[i], dlses[i], outs[i], lses[i], queries[i], keys[j], values[j])
                bias = _bias(bias_HTS, ring, i, k_places)
                dq_part, dk, dv, db = ring.operations.partial_attention_gradients(
                    *tensors, bias_HTS=bias, **part, **ring.options
                )
                list(pieces(dq, own))[i].add_(dq_part)
                dkeys[j].add_(dk)
                dvalues[j].add_(dv)
                dbias_part = _bias(dbias, ring, i, k_places)
                if dbias_part is not None and db is not None:
                    dbias_part.add_(db)
            total = added if returning is None else added.add_(returning.wait())
            returning = ring.pass_on(total)
            here = here if coming is None else coming.wait()
        assert returning is not None
        dk, dv = returning.wait().to(k_BTGE.dtype)
        return dq.to(q_BTHE.dtype), dk, dv, dbias, None


def _bias(bias_HTS: Tensor | None, ring: _Ring, which: int, keys: Run) -> Tensor | None:
    """Return the bias of a piece of this rank's queries and a piece of the row's keys, a view."""
    return None if bias_HTS is None else list(pieces(bias_HTS, ring.places(0)))[which].narrow(2, *keys)


def _merge(before: tuple[Tensor, Tensor] | None, out_BTHE: Tensor, lse_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (fp32 or wider) and lse over the keys of both.

    A query that saw no key yet has lse -inf there, and a share of 0; its own key is among those of the first step.
    """
    out_BTHE = out_BTHE.to(lse_BHT.dtype)
    if before is None:
        return out_BTHE, lse_BHT
    lse = torch.logaddexp(before[1], lse_BHT)
    shares = (torch.exp(x - lse).transpose(1, 2)[..., None] for x in (before[1], lse_BHT))
    return sum(share * out for share, out in zip(shares, (before[0], out_BTHE), strict=True)), lse  # type: ignore[return-value]
