"""Embedding lookup whose gradient is summed in one fixed order, in fp32.

    y[n] = weight[token[n]]        dweight[v] = sum of dy[n] over the n with token[n] = v

Positions are sorted by token (stably), so that those of a token are a run. A program sums a piece of a run: runs are
cut where the sorted position is a multiple of PIECE, so that a frequent token keeps many programs busy. A run of one
piece is stored at once; the pieces of longer ones are stored in fp32 and added, in their order, by a second kernel.
No atomics: the result does not depend on which program is first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference


@triton.jit(do_not_specialize=["count"])
def _sum_pieces(
    dy,
    tokens,
    order,
    dweight,
    partials,
    count,
    D,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the piece that begins at one sorted position, if one does.

    `partials` is [ceil(count / PIECE), 2, D]: of each stretch of PIECE positions the piece that its first position
    begins, and the piece that goes on in the next stretch, if its first position does not begin it.
    """
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + n)
    within = n % PIECE
    before = tl.load(tokens + n - 1, mask=n > 0, other=-1)
    if (before != token) | (within == 0):
        stop = tl.minimum(n - within + PIECE, count)  # of the stretch
        ahead = n + tl.arange(0, PIECE)
        same = tl.load(tokens + ahead, mask=ahead < stop, other=-1) == token
        length = tl.sum(same.to(tl.int32), axis=0)
        d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        total = tl.zeros((DEPTH, BLOCK_D), tl.float32)
        for first in range(0, length, DEPTH):
            row = first + tl.arange(0, DEPTH)
            source = tl.load(order + n + row, mask=row < length, other=0)[:, None]
            total += tl.load(dy + source * D + d, mask=(row < length)[:, None] & (d < D), other=0.0).to(tl.float32)
        whole = tl.sum(total, axis=0)[None, :]
        goes_on = (n + length == stop) & (tl.load(tokens + stop, mask=stop < count, other=-1) == token)
        if goes_on | (before == token):
            slot = (n // PIECE) * 2 + tl.where(within == 0, 0, 1)
            tl.store(partials + slot * D + d, whole, mask=d < D)
        else:
            tl.store(dweight + token.to(tl.int64) * D + d, whole.to(dweight.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["count"])
def _add_pieces(
    tokens,
    dweight,
    partials,
    count,
    D,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the pieces of the run that goes on at the border after one stretch, if it began in that stretch."""
    stretch = tl.program_id(0).to(tl.int64)
    border = (stretch + 1) * PIECE
    token = tl.load(tokens + border)
    crosses = tl.load(tokens + border - 1) == token
    at_first = tl.load(tokens + border - PIECE) == token
    earlier = tl.load(tokens + border - PIECE - 1, mask=stretch > 0, other=-1)
    if crosses & (earlier != token):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        slot = stretch * 2 + tl.where(at_first, 0, 1)
        total = tl.load(partials + slot * D + d, mask=d < D, other=0.0)
        found = DEPTH
        while found == DEPTH:
            stretch += 1
            following = stretch + tl.arange(0, DEPTH)
            first = tl.load(tokens + following * PIECE, mask=following * PIECE < count, other=-1)
            same = (first == token)[:, None]
            pieces = partials + following[:, None] * 2 * D + d[None, :]
            total += tl.sum(tl.load(pieces, mask=same & (d < D)[None, :], other=0.0), axis=0)
            found = tl.sum((first == token).to(tl.int32), axis=0)
            stretch += DEPTH - 1
        tl.store(dweight + token.to(tl.int64) * D + d, total.to(dweight.dtype.element_ty), mask=d < D)


def _launch(dy: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    D = dy.shape[-1]
    dweight = dy.new_zeros(vocab, D)
    count = tokens.numel()
    if count == 0 or dweight.numel() == 0:
        return dweight
    dy = dy.contiguous()
    # int32 halves the passes of a radix sort
    ordered, order = torch.sort(tokens.flatten().to(torch.int32 if vocab < 2**31 else torch.int64), stable=True)
    chosen = launch.settings("embedding", "sum_pieces", D)
    piece = chosen["PIECE"]
    stretches = triton.cdiv(count, piece)
    partials = torch.empty((stretches, 2, D), dtype=torch.float32, device=dy.device)
    blocks = triton.cdiv(D, chosen["BLOCK_D"])
    _sum_pieces[(count, blocks)](dy, ordered, order, dweight, partials, count, D, **chosen)
    if stretches > 1:
        chosen = launch.settings("embedding", "add_pieces", D)
        blocks = triton.cdiv(D, chosen["BLOCK_D"])
        _add_pieces[(stretches - 1, blocks)](ordered, dweight, partials, count, D, PIECE=piece, **chosen)
    return dweight


@torch.library.custom_op("megalm::embedding", mutates_args=())
def _embedding_op(tokens: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.embedding(tokens, weight)


@_embedding_op.register_fake
def _(tokens: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[1]))


@torch.library.custom_op("megalm::embedding_backward", mutates_args=())
def _backward_op(dy: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    return _launch(dy, tokens, vocab)


@_backward_op.register_fake
def _(dy: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    return dy.new_empty((vocab, dy.shape[-1]))


def _setup(ctx, inputs, output):
    tokens, weight = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab = weight.shape[0]


def _backward(ctx, dy):
    (tokens,) = ctx.saved_tensors
    return None, torch.ops.megalm.embedding_backward(dy, tokens, ctx.vocab)


_embedding_op.register_autograd(_backward, setup_context=_setup)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the rows of the weight that the tokens name: tokens [...] int64 -> [..., D] in the weight's dtype.

    The gradient has the weight's dtype, is summed in fp32 and the same bit for bit in every run; rows that no token
    names get 0. Tokens must be 0 .. V-1, as for torch's embedding, which does the lookup: a layer whose rows are split
    over ranks replaces the tokens of others before and their rows after. Raises ValueError for other shapes or dtypes.
    """
    if weight_VD.dim() != 2 or not weight_VD.is_floating_point() or tokens.dtype != torch.int64:
        given = f"{tokens.dtype} tokens in a {weight_VD.dtype} weight of shape {tuple(weight_VD.shape)}"
        raise ValueError(f"embedding of {given}; give int64 tokens and a floating-point weight [V, D]")
    if not launch.fused(tokens, weight_VD):
        return reference.embedding(tokens, weight_VD)
    return torch.ops.megalm.embedding(tokens, weight_VD)
