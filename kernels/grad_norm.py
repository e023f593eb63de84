"""L2 norm over many tensors at once, in one launch for each dtype among them and one for the result.

    norm = sqrt(sum of x^2 over all elements of all tensors)

First stage: a program sums the squares of one chunk of one tensor, which it finds in a table of addresses, sizes and
first chunks. Second stage: one program adds the chunks' sums in their order. All in fp32 and in an order that does not
depend on where the tensors lie, so that equal ones give equal norms bit for bit. An inf or NaN anywhere comes out.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.kernels import launch, reference

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_VECTOR_BYTES = tl.constexpr(16)
_MOST_TENSORS = 1024  # of a launch: each program looks at the first chunk of every one


@triton.jit(do_not_specialize=["entry", "first_sum", "count"])
def _sum_chunks(
    table,
    entry,
    sums,
    first_sum,
    count,
    TENSORS: tl.constexpr,
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one chunk; `table` from `entry` on [3, count] holds addresses, sizes and first chunks."""
    table += entry
    chunk = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TENSORS)
    firsts = tl.load(table + 2 * count + i, mask=i < count, other=2**62)
    mine = tl.sum((firsts <= chunk).to(tl.int32), axis=0) - 1
    address = tl.load(table + mine)
    size = tl.load(table + count + mine)
    at = (chunk - tl.load(table + 2 * count + mine)) * CHUNK
    begin = address.to(tl.pointer_type(TYPE)) + at
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if (at + CHUNK <= size) & (address % _VECTOR_BYTES == 0):
        begin = tl.multiple_of(begin, _VECTOR_BYTES)
        for first in range(0, CHUNK, BLOCK):
            x = tl.load(begin + first + place).to(tl.float32)
            total += x * x
    else:  # the same sums in the same order, of elements that are read one by one
        length = tl.minimum(size - at, CHUNK).to(tl.int32)
        for first in range(0, length, BLOCK):
            x = tl.load(begin + first + place, mask=first + place < length, other=0.0).to(tl.float32)
            total += x * x
    tl.store(sums + first_sum + chunk, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def _add_sums(sums, out, count, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        total += tl.load(sums + first + place, mask=first + place < count, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(out, result if SQUARED else tl.sqrt_rn(result))


def _is_a_run(tensor: Tensor) -> bool:
    """Return whether the elements fill one run of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _launch(tensors: Sequence[Tensor], squared: bool) -> Tensor:
    device = tensors[0].device
    tensors = [x if _is_a_run(x) else x.contiguous() for x in tensors if x.numel() > 0]
    chosen = launch.settings("grad_norm", "sum_chunks")
    table: list[int] = []
    launches = []  # (first entry of the table, tensors, first chunk, chunks, dtype)
    all_chunks = 0
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        of_dtype = [x for x in tensors if x.dtype is dtype]
        for some in (of_dtype[i : i + _MOST_TENSORS] for i in range(0, len(of_dtype), _MOST_TENSORS)):
            chunks_each = [triton.cdiv(x.numel(), chosen["CHUNK"]) for x in some]
            *firsts, chunks = itertools.accumulate(chunks_each, initial=0)
            launches.append((len(table), len(some), all_chunks, chunks, dtype))
            table += [*(x.data_ptr() for x in some), *(x.numel() for x in some), *firsts]
            all_chunks += chunks

    out = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(all_chunks, dtype=torch.float32, device=device)
    # Pinned memory is copied while the host goes on, and given out again by torch only after that.
    on_host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    on_device = on_host.to(device, non_blocking=True)
    for entry, count, first_chunk, chunks, dtype in launches:
        _sum_chunks[(chunks,)](
            on_device,
            entry,
            sums,
            first_chunk,
            count,
            TENSORS=max(64, triton.next_power_of_2(count)),  # few variants to compile
            TYPE=_TYPES[dtype],
            **chosen,
        )
    _add_sums[(1,)](sums, out, all_chunks, SQUARED=squared, **launch.settings("grad_norm", "add_sums"))
    return out


@torch.library.custom_op("megalm::grad_norm", mutates_args=())
def _grad_norm_op(tensors: Sequence[Tensor], squared: bool) -> Tensor:
    return _launch(tensors, squared)


@_grad_norm_op.register_fake
def _(tensors: Sequence[Tensor], squared: bool) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


def grad_norm(tensors: Sequence[Tensor], *, squared: bool = False) -> Tensor:
    """Return the L2 norm over all elements of all tensors, or its square if `squared`: 0-dim, fp32.

    Tensors may have any shapes and strides and mixed dtypes (fp32, bf16, fp16 on a GPU; if one is fp64, plain torch
    takes all, and the result is fp64); all lie on one device, where the result is. No tensors: 0 on the CPU.
    The device is not waited for. Not differentiable. Raises ValueError for other dtypes or mixed devices.
    """
    tensors = [x.detach() for x in tensors]
    if wrong := [str(x.dtype) for x in tensors if not x.is_floating_point()]:
        raise ValueError(f"grad_norm of {wrong[0]} tensors; give floating-point ones")
    if len(devices := {str(x.device) for x in tensors}) > 1:
        raise ValueError(f"grad_norm of tensors on {', '.join(sorted(devices))}; give all on one device")
    if not tensors or not launch.fused(*tensors):
        return reference.grad_norm(tensors, squared=squared)
    return torch.ops.megalm.grad_norm(tensors, squared)
