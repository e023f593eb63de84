"""AdamW on all tensors of a call with one launch (one for each combination of dtypes among them).

    g = gradient * scale            m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    p = p - lr wd p - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

in fp32, every operation rounded on its own: no fused multiply-add, exact roots and quotients. So the result does not
depend on launch settings or on the GPU, and is that of the reference to the bit. The corrections 1 - b^t are
computed in float64 on the host.

Stochastic rounding to bf16 adds 16 random bits below the last bit kept and cuts off. Element n of tensor number i takes
the upper half of word n % 4 of Philox4x32-10 at counter (low half of n // 4, high half, i, step) under the key `seed`.

What a launch needs to know of each tensor stands in a table on the device, which is built when a set of addresses is
first met: a row of 64-bit integers a tensor, then an entry a block of elements, which names a row and a block in it.

Sources: Loshchilov and Hutter 2019, algorithm 2; Kingma and Ba 2015; Zamirai et al. 2020 (stochastic rounding).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_STATE_DTYPES = (torch.float32, torch.bfloat16)
_FIELDS = tl.constexpr(9)  # of a table's row; the first five are addresses
_WEIGHT, _GRADIENT, _AVERAGE, _SQUARE, _MASTER, _ELEMENTS, _ALIGNED, _NUMBER, _DECAY = map(tl.constexpr, range(9))
_ALIGNMENT = 16  # bytes


@triton.jit
def _pointer(row, FIELD: tl.constexpr, start, TYPE: tl.constexpr, FAST: tl.constexpr):
    pointer = tl.load(row + FIELD).to(tl.pointer_type(TYPE)) + start
    if FAST:  # four elements at once, 16 bytes of fp32 and 8 of bf16: a thread has the same ones of all tensors
        pointer = tl.multiple_of(pointer, 4 * (TYPE.primitive_bitwidth // 8))
    return pointer


@triton.jit
def _round_stochastically(value, start, key, number, step, BLOCK: tl.constexpr):
    """Return fp32 values that bf16 can hold, for elements start ... start + BLOCK - 1 of a tensor."""
    counter = (start + 4 * tl.arange(0, BLOCK // 4)) >> 2
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    key = key.to(tl.uint64)
    k0, k1 = zero + (key & 0xFFFFFFFF).to(tl.uint32), zero + (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(low, high, zero + number.to(tl.uint32), zero + step.to(tl.uint32), k0, k1, 10)
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    bits = value.to(tl.uint32, bitcast=True) + (word >> 16)
    rounded = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return tl.where(value == value, rounded, value)  # the sum may carry a NaN's bits over into a number


@triton.jit
def _update(
    row, start, left, scale, lr, step_size, beta1, rest1, beta2, rest2, inverse_root, eps, step, key,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, AVERAGE: tl.constexpr, SQUARE: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update elements start ... start + BLOCK - 1 of one tensor, of which `left` exist; all exist if FAST."""
    n = tl.arange(0, BLOCK)
    inside = None if FAST else n < left
    weight = _pointer(row, _WEIGHT, start, WEIGHT, FAST) + n
    gradient = _pointer(row, _GRADIENT, start, GRADIENT, FAST) + n
    average = _pointer(row, _AVERAGE, start, AVERAGE, FAST) + n
    square = _pointer(row, _SQUARE, start, SQUARE, FAST) + n
    held = _pointer(row, _MASTER, start, tl.float32, FAST) + n if MASTER else weight
    g = tl.load(gradient, mask=inside).to(tl.float32)
    m = tl.load(average, mask=inside).to(tl.float32)
    v = tl.load(square, mask=inside).to(tl.float32)
    p = tl.load(held, mask=inside).to(tl.float32)
    decay = tl.load(row + _DECAY).to(tl.int32).to(tl.float32, bitcast=True)

    g = g * scale
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p - p * (lr * decay)
    p = p - tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps) * step_size

    tl.store(average, m, mask=inside)
    tl.store(square, v, mask=inside)
    if MASTER:
        tl.store(held, p, mask=inside)
    if STOCHASTIC:
        p = _round_stochastically(p, start, key, tl.load(row + _NUMBER), step, BLOCK)
    tl.store(weight, p, mask=inside)


@triton.jit(do_not_specialize=["step", "key"])
def _adamw(
    table, entries, scale_pointer, scale, lr, step_size, beta1, rest1, beta2, rest2, inverse_root, eps, step,
    key: tl.int64,
    SCALED: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, AVERAGE: tl.constexpr, SQUARE: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.load(entries + tl.program_id(0))
    row = table + (entry >> 32) * _FIELDS
    start = (entry & 0xFFFFFFFF) * BLOCK
    left = tl.load(row + _ELEMENTS) - start
    if SCALED:
        scale = tl.load(scale_pointer)
    if tl.abs(scale) < float("inf"):  # false for NaN too
        # Whole blocks of aligned tensors are read without a mask, whose borders would forbid wide accesses.
        if (left >= BLOCK) & (tl.load(row + _ALIGNED) == 1):
            _update(
                row, start, left, scale, lr, step_size, beta1, rest1, beta2, rest2, inverse_root, eps, step, key,
                WEIGHT, GRADIENT, AVERAGE, SQUARE, MASTER, STOCHASTIC, True, BLOCK,
            )  # fmt: skip
        else:
            # In pieces: addresses and masks of single elements take many registers, which the others would lack.
            for piece in range(0, tl.minimum(left, BLOCK), BLOCK // 8):
                _update(
                    row, start + piece, left - piece, scale, lr, step_size, beta1, rest1, beta2, rest2, inverse_root,
                    eps, step, key, WEIGHT, GRADIENT, AVERAGE, SQUARE, MASTER, STOCHASTIC, False, BLOCK // 8,
                )  # fmt: skip


class _Row(NamedTuple):
    """What the table says of a tensor, and the dtypes by which launches are told apart."""

    addresses: tuple[int, ...]
    elements: int
    aligned: bool
    decay: float
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]


class _Launch(NamedTuple):
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    entries: Tensor


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[_Row, ...], block: int, device: torch.device, stream: int) -> tuple[Tensor, list[_Launch]]:
    """Return the rows on the device, and of each combination of dtypes its entries: row << 32 | block in that row.

    A stream is part of what makes a table, since no other stream waits for the copy.
    """
    decays = torch.tensor([row.decay for row in rows], dtype=torch.float32).view(torch.int32).tolist()
    fields = [
        (*row.addresses, row.elements, row.aligned, number, decay)
        for number, (row, decay) in enumerate(zip(rows, decays, strict=True))
    ]
    blocks = torch.tensor([triton.cdiv(row.elements, block) for row in rows])
    parts = [torch.tensor(fields, dtype=torch.int64).flatten()]
    kinds = list(dict.fromkeys(row.dtypes for row in rows))
    for kind in kinds:
        chosen = torch.tensor([number for number, row in enumerate(rows) if row.dtypes == kind])
        counts = blocks[chosen]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        parts.append((chosen << 32).repeat_interleave(counts) | within)
    host = torch.cat(parts)
    whole = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    table, *entries = whole.split([len(part) for part in parts])
    return table, [_Launch(kind, entry) for kind, entry in zip(kinds, entries, strict=True) if len(entry)]


def _row(
    weight: Tensor, gradient: Tensor, average: Tensor, square: Tensor, master: Tensor | None, decay: float
) -> _Row:
    w, g, m, v = weight.data_ptr(), gradient.data_ptr(), average.data_ptr(), square.data_ptr()
    p = 0 if master is None else master.data_ptr()
    dtypes = (weight.dtype, gradient.dtype, average.dtype, square.dtype)
    return _Row((w, g, m, v, p), weight.numel(), (w | g | m | v | p) % _ALIGNMENT == 0, decay, dtypes)


@torch.library.custom_op("megalm::adamw_", mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "masters"))
def _adamw_op(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    gradient_scale: Tensor | None,
    factor: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decays: list[float],
    step: int,
    stochastic: bool,
    seed: int,
) -> None:
    device = weights[0].device
    gradients = [gradient.contiguous() for gradient in gradients]
    held: list[Tensor | None] = [*masters] if masters else [None] * len(weights)
    rows = tuple(map(_row, weights, gradients, exp_avgs, exp_avg_sqs, held, decays))
    chosen = launch.settings("adamw", "step", sum(row.elements for row in rows))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table, launches = _table(rows, chosen["BLOCK"], device, stream)
    for kind, entries in launches:
        weight, gradient, average, square = (_TRITON_TYPES[dtype] for dtype in kind)
        _adamw[(len(entries),)](
            table,
            entries,
            table if gradient_scale is None else gradient_scale,
            factor,
            lr,
            lr / (1.0 - beta1**step),
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 / math.sqrt(1.0 - beta2**step),
            eps,
            step,
            seed,
            SCALED=gradient_scale is not None,
            WEIGHT=weight,
            GRADIENT=gradient,
            AVERAGE=average,
            SQUARE=square,
            MASTER=bool(masters),
            STOCHASTIC=stochastic and weight == tl.bfloat16,
            enable_fp_fusion=False,
            **chosen,
        )


def fused_adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    step: int,
    masters: Sequence[Tensor] | None = None,
    gradient_scale: Tensor | float | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """Do step number `step` (from 1) of AdamW in place: on the weights, their masters and both states.

    weights: fp32, bf16 or fp16. With `masters`, fp32 and one for each bf16 or fp16 weight, the master is updated and
    the weight is its rounded copy. Without, the weight itself is updated in fp32 and rounded: to the nearest, or bf16
    with `stochastic_rounding` by bits that are functions of `seed` (0 .. 2^64-1), `step`, the tensor's number in the
    call and the element's index.
    gradients: any of the dtypes. exp_avgs, exp_avg_sqs: fp32, or bf16, which rounds them to the nearest; a bf16
    exp_avg_sq hardly moves where 1 - beta2 is below 2^-9. All but gradients are contiguous.
    weight_decay: decoupled; a number, or one a tensor. gradient_scale: multiplies every gradient; a number, or an fp32
    tensor of one element on the weights' device, which nobody waits for. If it is infinite or NaN nothing is changed.
    Nothing is differentiable. Before it is captured in a CUDA graph, a call must have run once with the same tensors.
    Raises ValueError for what does not fit. Source: Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW.
    """
    decays = [float(d) for d in weight_decay] if isinstance(weight_decay, Sequence) else [weight_decay] * len(weights)
    _check_numbers(lr, betas, eps, step, decays)
    _check_tensors(weights, gradients, exp_avgs, exp_avg_sqs, masters, decays)
    scale = gradient_scale if isinstance(gradient_scale, Tensor) else None
    factor = 1.0 if gradient_scale is None or scale is not None else float(gradient_scale)
    if scale is not None and (scale.numel() != 1 or scale.dtype is not torch.float32):
        raise ValueError(f"gradient_scale of shape {tuple(scale.shape)}, {scale.dtype}; give one fp32 element")
    if scale is not None and weights and scale.device != weights[0].device:
        raise ValueError(f"gradient_scale on {scale.device}, weights on {weights[0].device}; give it on their device")
    if stochastic_rounding and (masters is not None or any(w.dtype is torch.float16 for w in weights)):
        raise ValueError("stochastic_rounding has masters or fp16 weights; it is for bf16 weights without masters")
    if not weights or not math.isfinite(factor):
        return
    with torch.no_grad():
        if not launch.fused(*weights, *gradients, *exp_avgs, *exp_avg_sqs, *(masters or ()), scale):
            reference.fused_adamw_(
                weights, gradients, exp_avgs, exp_avg_sqs, lr=lr, betas=betas, eps=eps, weight_decay=decays, step=step,
                masters=masters, gradient_scale=gradient_scale, stochastic_rounding=stochastic_rounding, seed=seed,
            )  # fmt: skip
            return
        torch.ops.megalm.adamw_(
            list(weights), list(gradients), list(exp_avgs), list(exp_avg_sqs), list(masters or ()), scale, factor, lr,
            *betas, eps, decays, step, stochastic_rounding, launch.signed_key(seed),
        )  # fmt: skip


def _check_numbers(lr: float, betas: tuple[float, float], eps: float, step: int, decays: Sequence[float]) -> None:
    if not (0.0 <= lr < math.inf and 0.0 <= eps < math.inf and all(0.0 <= beta < 1.0 for beta in betas)):
        raise ValueError(f"AdamW with lr={lr}, betas={betas}, eps={eps}; all are at least 0 and finite, betas below 1")
    for decay in decays:
        if not 0.0 <= decay < math.inf:
            raise ValueError(f"AdamW with weight_decay={decay}; it is at least 0 and finite")
    if step < 1:
        raise ValueError(f"AdamW at step={step}; the first step is number 1")


def _check_tensors(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    decays: Sequence[float],
) -> None:
    others = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    others |= {} if masters is None else {"masters": masters}
    for name, given in (*others.items(), ("weight_decay", decays)):
        if len(given) != len(weights):
            raise ValueError(f"AdamW of {len(weights)} weights has {len(given)} {name}; give one for each")
    for name, tensors in ({"weights": weights} | others).items():
        for number, (weight, tensor) in enumerate(zip(weights, tensors, strict=True)):
            problem = _problem(name, weight, tensor)
            if problem:
                raise ValueError(f"AdamW: {name}[{number}] {problem}")


def _problem(name: str, weight: Tensor, tensor: Tensor) -> str | None:
    if tensor.shape != weight.shape or tensor.device != weight.device:
        here = f"{tuple(weight.shape)} on {weight.device}"
        return f"has shape {tuple(tensor.shape)} on {tensor.device}; its weight has {here}"
    if name != "gradients" and not tensor.is_contiguous():
        return f"of shape {tuple(tensor.shape)} has strides {tensor.stride()}; only gradients may be non-contiguous"
    if weight.dtype is torch.float64:
        return None  # a matter for the reference alone
    if name.startswith("exp") and tensor.dtype not in _STATE_DTYPES:
        return f"is {tensor.dtype}; use fp32, or bf16"
    if name == "masters" and (tensor.dtype is not torch.float32 or weight.dtype is torch.float32):
        return f"is {tensor.dtype} for a weight of {weight.dtype}; fp32 masters are for bf16 and fp16 weights"
    return None
