"""Random numbers that are functions of a key and of an index in a whole, logical tensor: the same in every layout.

Element n (row-major linear index in the global tensor) is word n % 4 of Philox4x32-10 at counter
(low 32 bits of n // 4, high 32 bits of n // 4, 0, 0). A rank makes just the elements that it holds, in pieces of
bounded size, so neither its rank nor the layout shows in a weight or a dropout mask. No generator has a state.
Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

Cost on one core of an AMD EPYC with torch 2.13, a million elements at once: 6 to 7 ns an element of a dropout mask
(`torch.nn.functional.dropout`, mask and product: 6.5 to 7), 6 to 7 ns a uniform and 13 to 15 ns a normal number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from megalm.distributed.sharding import ShardSpec

_MASK = 0xFFFFFFFF
_WITHIN = math.erf(3.0 / math.sqrt(2.0))  # the share of a normal distribution within three deviations
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters (of 4 numbers each) that are worked on at once, in six int64 buffers: 6 MiB on a CPU, where a quarter of it
# costs a quarter more time (calls) and four times as much a fifth more (cache); 48 MiB on an accelerator.
_COUNTERS_CPU = 1 << 17
_COUNTERS_ACCELERATOR = 1 << 20

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Emit = Callable[[Words, Tensor], None]
"""Turns four words [...] (int64, 0 .. 2^32-1, free to be overwritten) into the numbers [..., 4]."""


def key(seed: int, *parts: object) -> int:
    """Return the 64-bit key of a named stream: `key(seed, "init", "head.weight")`."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def philox_4x32(counter: Words, stream_key: int) -> Words:
    """Return Philox4x32-10 of a 128-bit counter, four int64 tensors of 32-bit words, under a 64-bit key."""
    a, b, c, d = (word.clone() for word in counter)
    x, y = torch.empty_like(a), torch.empty_like(a)
    return _rounds((a, b, c, d, x, y), stream_key, 0)


def uniform_slice(
    stream_key: int,
    global_shape: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return float32 numbers in [0, 1), multiples of 2^-24: `global[start : start + length, ...]` of the stream."""
    result = torch.empty(tuple(lengths), dtype=torch.float32, device=device)
    _fill(result, stream_key, global_shape, starts, _emit_uniform)
    return result


def keep_slice(
    stream_key: int,
    rate: float,
    global_shape: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return the bool mask `uniform_slice(...) >= rate`, exactly, without making the numbers."""
    assert 0.0 <= rate < 1.0, f"rate {rate}"
    # (word >> 8) * 2^-24 >= rate  <=>  word >= ceil(rate * 2^24) * 2^8; a product with 2^24 is exact.
    threshold = math.ceil(rate * 2**24) << 8

    def emit(words: Words, numbers: Tensor) -> None:
        for index, word in enumerate(words):
            torch.ge(word, threshold, out=numbers[..., index])

    result = torch.empty(tuple(lengths), dtype=torch.bool, device=device)
    _fill(result, stream_key, global_shape, starts, emit)
    return result


def words_of_part(stream_key: int, spec: ShardSpec, start: int, stop: int, device: torch.device) -> Tensor:
    """Return words (int64, 0 .. 2^32-1) [stop - start] of the elements [start, stop) of the flattened local tensor.

    An element has the word of its index in the whole tensor, so its place on a rank does not matter; padding has 0.
    """
    dim = 0 if spec.dim is None else spec.dim
    inner = math.prod(spec.local_shape[dim + 1 :])
    width, whole = (math.prod(shape[dim:]) for shape in (spec.local_shape, spec.global_shape))
    held, left = (width, 0) if spec.dim is None else (spec.length * inner, spec.start * inner)
    first, last = start // width, -(-stop // width)
    if last - first == 2:  # the whole of two runs may be much more than a piece that lies across their border
        halves = ((start, last * width - width), (last * width - width, stop))
        return torch.cat([words_of_part(stream_key, spec, *half, device) for half in halves])
    if last - first <= 1:  # within one run of the whole, however long
        low, high = start - first * width, min(stop - first * width, held)
        lengths, begin = (last - first, max(high - low, 0)), low
    else:
        lengths, begin = (last - first, held), 0
    rows = math.prod(spec.global_shape[:dim])
    words = torch.empty(lengths, dtype=torch.int64, device=device)
    ahead = (spec.first_expert or 0) * (rows // spec.global_shape[0]) if dim else 0
    _fill(words, stream_key, (rows, whole), (ahead + first, left + begin if lengths[1] else 0), _emit_words)
    if lengths[0] <= 1:
        flat = words.flatten()
        return torch.nn.functional.pad(flat, (0, stop - start - flat.numel()))
    flat = torch.nn.functional.pad(words, (0, width - held)).flatten()
    return flat[start - first * width : stop - first * width]


def normal_slice(
    stream_key: int,
    std: float,
    global_shape: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    truncated: bool = False,
) -> Tensor:
    """Return normal numbers of mean 0, made in float64 (Box and Muller 1958) and cast to `dtype`.

    `truncated` ones lie within 3 `std`: the inverse of their distribution at a uniform number.
    """

    def emit_truncated(words: Words, numbers: Tensor) -> None:
        for index, word in enumerate(words):
            place = _open_uniform(word).mul_(2.0 * _WITHIN).sub_(_WITHIN)
            numbers[..., index].copy_(place.erfinv_().mul_(std * math.sqrt(2.0)))

    def emit(words: Words, numbers: Tensor) -> None:
        for pair in (0, 2):
            radius, angle = (_open_uniform(words[pair + index]) for index in (0, 1))
            radius.log_().mul_(-2.0).sqrt_().mul_(std)
            angle.mul_(2.0 * math.pi)
            numbers[..., pair].copy_(torch.cos(angle).mul_(radius))
            numbers[..., pair + 1].copy_(angle.sin_().mul_(radius))

    result = torch.empty(tuple(lengths), dtype=dtype, device=device)
    _fill(result, stream_key, global_shape, starts, emit_truncated if truncated else emit)
    return result


def normal_shard(
    spec: ShardSpec, stream_key: int, std: float, dtype: torch.dtype, device: torch.device, truncated: bool = False
) -> Tensor:
    """Return a rank's part of a normal logical tensor, shape `spec.local_shape`; padding is zero."""
    starts, lengths = [0] * len(spec.global_shape), list(spec.global_shape)
    if spec.first_expert is not None:
        starts[0], lengths[0] = spec.first_expert, spec.local_shape[0]
    if spec.dim is not None:
        starts[spec.dim], lengths[spec.dim] = spec.start, spec.length
    held = normal_slice(stream_key, std, spec.global_shape, starts, lengths, dtype, device, truncated)
    if held.shape == spec.local_shape:
        return held
    assert spec.dim is not None, f"{spec.name}: global {spec.global_shape}, local {spec.local_shape}, yet not split"
    local = torch.zeros(spec.local_shape, dtype=dtype, device=device)
    local.narrow(spec.dim, 0, spec.length).copy_(held)
    return local


def _emit_words(words: Words, numbers: Tensor) -> None:
    for index, word in enumerate(words):
        numbers[..., index].copy_(word)


def _emit_uniform(words: Words, numbers: Tensor) -> None:
    for index, word in enumerate(words):
        numbers[..., index].copy_(word.bitwise_right_shift_(8))  # 24 bits: exact in float32
    numbers.mul_(2.0**-24)


def _open_uniform(word: Tensor) -> Tensor:
    """Return (word + 0.5) / 2^32 in float64, which is never 0 or 1."""
    return word.to(torch.float64).add_(0.5).mul_(2.0**-32)


def _fill(result: Tensor, stream_key: int, global_shape: Sequence[int], starts: Sequence[int], emit: Emit) -> None:
    """Fill `result` with the numbers of global[starts : starts + result.shape]; on the meta device there are none."""
    if result.numel() == 0 or result.is_meta:
        return
    first, length = _runs(global_shape, starts, result.shape)
    runs = result.view(len(first), length)
    limit = _COUNTERS_CPU if result.device.type == "cpu" else _COUNTERS_ACCELERATOR
    needed = min(limit, len(first) * _counters(length))
    scratch = torch.empty(6, needed, dtype=torch.int64, device=result.device)
    for row, count in _batches(first, length, limit):
        if count > 1:
            _fill_rows(runs[row : row + count], first[row : row + count], stream_key, scratch, emit)
            continue
        start = int(first[row])
        for begin, end in _pieces(start, start + length, limit):
            piece = runs[row : row + 1, begin - start : end - start]
            _fill_rows(piece, torch.tensor([begin]), stream_key, scratch, emit)


def _runs(global_shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, int]:
    """Return the first linear index of every contiguous run (int64, ascending, on the CPU), and the runs' length."""
    assert len(global_shape) == len(starts) == len(lengths), f"{global_shape}, {starts}, {lengths}"
    for size, start, part in zip(global_shape, starts, lengths, strict=True):
        assert start >= 0 and start + part <= size, f"[{start}, {start + part}) outside of {size}"
    length, stride, dim = 1, 1, len(global_shape)
    while dim > 0 and length == stride:  # the dims from here on are whole, so the next one is contiguous too
        dim -= 1
        length, stride = length * lengths[dim], stride * global_shape[dim]
    first = torch.tensor([starts[dim] * (stride // global_shape[dim]) if dim < len(global_shape) else 0])
    while dim > 0:
        dim -= 1
        offsets = (starts[dim] + torch.arange(lengths[dim])) * stride
        stride *= global_shape[dim]
        first = (offsets[:, None] + first[None, :]).flatten()
    return first, length


def _batches(first: Tensor, length: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield (row, count) such that `count` runs fit into `limit` counters and share their counters' high word."""
    most = max(1, limit // _counters(length))
    row = 0
    while row < len(first):
        count = min(most, len(first) - row)
        last = int(first[row + count - 1]) + length + 8
        if count > 1 and int(first[row]) >> 34 != last >> 34:
            count = 1  # a 2^34th number lies among them: one run at a time, cut there
        yield row, count
        row += count


def _pieces(begin: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut the linear indices [begin, end) at multiples of `limit` counters, a power of two that divides 2^32."""
    while begin < end:
        cut = min(end, (begin // (4 * limit) + 1) * 4 * limit)
        yield begin, cut
        begin = cut


def _counters(length: int) -> int:
    """Return how many counters cover a run of `length` numbers that begins at any word of the first."""
    return (length + 6) // 4


def _fill_rows(rows: Tensor, first: Tensor, stream_key: int, scratch: Tensor, emit: Emit) -> None:
    """Fill rows[i] with the numbers first[i], first[i] + 1, ...; all counters have the same high word."""
    count, length = rows.shape
    offsets = first % 4
    aligned = length % 4 == 0 and not offsets.any()
    width = length // 4 if aligned else _counters(length) if count > 1 else (int(offsets) + length + 3) // 4
    high = int(first[0]) >> 34
    buffers = tuple(buffer[: count * width].view(count, width) for buffer in scratch)
    low = (first // 4 - (high << 32)).to(rows.device)
    torch.add(low[:, None], torch.arange(width, device=rows.device), out=buffers[0])
    words = _words(buffers, high, stream_key)
    if aligned:
        emit(words, rows.unflatten(1, (width, 4)))
        return
    numbers = torch.empty(count, width, 4, dtype=rows.dtype, device=rows.device)
    emit(words, numbers)
    flat = numbers.flatten(1)
    for offset in offsets.unique().tolist():
        chosen = (offsets == offset).to(rows.device)
        part = flat[:, offset : offset + length]
        if bool(chosen.all()):
            rows.copy_(part)
        else:
            rows[chosen] = part[chosen]


def _words(buffers: Sequence[Tensor], high: int, stream_key: int) -> Words:
    """Return the words of the counters (buffers[0], high, 0, 0); the six buffers are overwritten.

    The first three rounds are written out: much of their state is zero or one number for all counters.
    """
    a, b, c, d, x, y = buffers
    (m0, m1), keys = _MULTIPLIERS, [_round_key(stream_key, index) for index in range(3)]
    torch.mul(a, m0, out=d)
    torch.bitwise_right_shift(d, 32, out=c).bitwise_xor_(keys[0][1]).bitwise_and_(_MASK)
    constant = (high ^ keys[0][0]) * m0
    torch.mul(c, m1, out=b)
    torch.bitwise_right_shift(b, 32, out=a).bitwise_xor_(keys[1][0]).bitwise_and_(_MASK)
    torch.bitwise_xor(d, (constant >> 32) ^ keys[1][1], out=c).bitwise_and_(_MASK)
    torch.mul(a, m0, out=x)
    torch.mul(c, m1, out=y)
    torch.bitwise_right_shift(y, 32, out=a).bitwise_xor_(b).bitwise_xor_(keys[2][0]).bitwise_and_(_MASK)
    torch.bitwise_right_shift(x, 32, out=c).bitwise_xor_((constant & _MASK) ^ keys[2][1]).bitwise_and_(_MASK)
    return _rounds((a, y, c, x, d, b), stream_key, 3)


def _rounds(buffers: tuple[Tensor, ...], stream_key: int, done: int) -> Words:
    """Return the four words after the rounds from `done` on; buffers: the state and two to spare, overwritten.

    Words 1 and 3 hold whole 64-bit products whose upper halves are masked away only after the next xor.
    """
    a, b, c, d, x, y = buffers
    for index in range(done, _ROUNDS):
        key0, key1 = _round_key(stream_key, index)
        torch.mul(a, _MULTIPLIERS[0], out=x)
        torch.mul(c, _MULTIPLIERS[1], out=y)
        # The shift copies the sign: the mask takes it away again.
        torch.bitwise_right_shift(y, 32, out=a).bitwise_xor_(b).bitwise_xor_(key0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(x, 32, out=c).bitwise_xor_(d).bitwise_xor_(key1).bitwise_and_(_MASK)
        b, d, x, y = y, x, d, b
    return a, b.bitwise_and_(_MASK), c, d.bitwise_and_(_MASK)


def _round_key(stream_key: int, index: int) -> tuple[int, int]:
    return ((stream_key & _MASK) + index * _WEYL[0]) & _MASK, ((stream_key >> 32) + index * _WEYL[1]) & _MASK
