"""The counter-based generator against published vectors, against itself in pieces, and against its distributions."""

from __future__ import annotations

import math
import struct
from hashlib import blake2b

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.distributed import random
from megalm.distributed.sharding import ShardSpec
from tests.shards import global_indices

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF

# kat_vectors of the Random123 distribution: counter, key, result of philox4x32-10
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_of_integers(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """The paper's algorithm on Python integers, sharing nothing with the code under test."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & ONES, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def word(key: int, n: int) -> int:
    counter = n // 4
    return philox_of_integers((counter & ONES, counter >> 32, 0, 0), key)[n % 4]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    words = random.philox_4x32(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(w) for w in words) == expected
    assert philox_of_integers(counter, key[0] | key[1] << 32) == expected


def test_key_is_little_endian_blake2b():
    digest = blake2b(b"1234/init/blocks.0.mlp.up.weight", digest_size=8).digest()
    assert random.key(1234, "init", "blocks.0.mlp.up.weight") == struct.unpack("<Q", digest)[0]
    assert random.key(1, "dropout", "embedding", 3) != random.key(1, "dropout", "embedding", 4)


@settings(max_examples=60, deadline=None)
@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**50), length=st.integers(1, 40))
def test_any_linear_index_matches_the_paper(key, first, length):
    numbers = random.uniform_slice(key, (2**51,), (first,), (length,), CPU)
    assert numbers.tolist() == [(word(key, first + i) >> 8) * 2.0**-24 for i in range(length)]


@pytest.mark.parametrize("first", [2**34 - 5, 2**34 - 2**17 - 3, 2**34, 2**35 - 1])
def test_numbers_across_the_high_word_of_the_counter(first):
    key, length = 987654321987654321, 2**17 + 11
    numbers = random.uniform_slice(key, (2**36,), (first,), (length,), CPU)
    for i in (0, 1, 4, 5, 6, 2**17 + 2, 2**17 + 3, length - 1):
        assert numbers[i].item() == (word(key, first + i) >> 8) * 2.0**-24
    rows = random.uniform_slice(key, (2**20, 2**16), (2**18 - 2, 3), (4, 50), CPU)
    for i in range(4):
        assert rows[i, 7].item() == (word(key, (2**18 - 2 + i) * 2**16 + 10) >> 8) * 2.0**-24


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_slice_is_the_slice_of_the_whole(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    starts = [data.draw(st.integers(0, size)) for size in shape]
    lengths = [data.draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]
    index = tuple(slice(start, start + part) for start, part in zip(starts, lengths, strict=True))
    whole = random.uniform_slice(77, shape, [0] * len(shape), shape, CPU)
    part = random.uniform_slice(77, shape, starts, lengths, CPU)
    assert part.shape == torch.Size(lengths)
    assert torch.equal(part, whole[index])
    assert torch.equal(random.keep_slice(77, 0.3, shape, starts, lengths, CPU), whole[index] >= 0.3)
    normal = random.normal_slice(77, 0.5, shape, [0] * len(shape), shape, torch.float64, CPU)
    got = random.normal_slice(77, 0.5, shape, starts, lengths, torch.float64, CPU)
    # Vectorised and scalar tails of log, sin and cos may differ in the last bit.
    torch.testing.assert_close(got, normal[index], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "dim", "start", "length"),
    [((700, 900), 1, 301, 333), ((700, 900), 0, 133, 400), ((4, 64, 64, 65), 2, 10, 31), ((300_000,), 0, 7, 299_990)],
)
def test_slices_longer_than_a_piece(shape, dim, start, length):
    whole = random.uniform_slice(5, shape, [0] * len(shape), shape, CPU)
    starts, lengths = [0] * len(shape), list(shape)
    starts[dim], lengths[dim] = start, length
    assert torch.equal(random.uniform_slice(5, shape, starts, lengths, CPU), whole.narrow(dim, start, length))
    kept = random.keep_slice(5, 0.1, shape, starts, lengths, CPU)
    assert torch.equal(kept, whole.narrow(dim, start, length) >= 0.1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_normal_shards_join_to_the_whole_and_pad_with_zeros(dim, count):
    shape = (130, 94)
    whole = random.normal_shard(ShardSpec.whole("w", shape), 3, 0.02, torch.float32, CPU)
    specs = [ShardSpec.split("w", shape, dim, index, count) for index in range(count)]
    shards = [random.normal_shard(spec, 3, 0.02, torch.float32, CPU) for spec in specs]
    assert all(shard.shape == spec.local_shape for shard, spec in zip(shards, specs, strict=True))
    joined = torch.cat(shards, dim)
    torch.testing.assert_close(joined.narrow(dim, 0, shape[dim]), whole, rtol=1e-7, atol=0)
    assert not joined.narrow(dim, shape[dim], joined.shape[dim] - shape[dim]).any()


def test_normal_numbers_are_box_muller_of_the_words():
    key, n = 424242, 4 * 12345
    u = [(word(key, n + i) + 0.5) * 2.0**-32 for i in range(4)]
    expected = []
    for a, b in (u[:2], u[2:]):
        radius = 0.7 * math.sqrt(-2.0 * math.log(a))
        expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    got = random.normal_slice(key, 0.7, (n + 4,), (n,), (4,), torch.float64, CPU)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_mean_and_variance():
    """With a million numbers the mean of u lies within 5 sigma = 5 * 0.2887e-3 of its expectation; others alike."""
    n = 1_000_000
    u = random.uniform_slice(1, (n,), (0,), (n,), CPU).double()
    assert abs(u.mean().item() - 0.5) < 1.5e-3
    assert abs(u.var().item() - 1 / 12) < 4e-4
    z = random.normal_slice(2, 1.0, (n,), (0,), (n,), torch.float64, CPU)
    assert abs(z.mean().item()) < 5e-3
    assert abs(z.var().item() - 1.0) < 7.1e-3
    assert abs((z**3).mean().item()) < 2e-2
    assert abs((z**4).mean().item() - 3.0) < 0.05
    neighbours = torch.corrcoef(torch.stack([z[:-1], z[1:]]))[0, 1].item()
    assert abs(neighbours) < 5e-3
    assert abs(random.keep_slice(3, 0.1, (n,), (0,), (n,), CPU).double().mean().item() - 0.9) < 1.5e-3


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 2.0**-24, 1 - 2.0**-24, 0.9999999999])
def test_keep_compares_exactly(rate):
    u = random.uniform_slice(9, (10_000,), (0,), (10_000,), CPU)
    assert torch.equal(random.keep_slice(9, rate, (10_000,), (0,), (10_000,), CPU), u.double() >= rate)


@pytest.mark.parametrize("offset", [-(2.0**-26), 0.0, 2.0**-26])
def test_keep_decides_exactly_at_the_rate_of_an_element(offset):
    u = random.uniform_slice(9, (8,), (0,), (8,), CPU).double()
    for index, number in enumerate(u.tolist()):
        kept = random.keep_slice(9, number + offset, (8,), (0,), (8,), CPU)
        assert kept[index].item() is (offset <= 0)
        assert torch.equal(kept, u >= number + offset)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_words_of_a_part_are_those_of_its_elements_in_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dim = data.draw(st.sampled_from([None, *range(len(shape))]))
    count = data.draw(st.integers(1, 3))
    index = data.draw(st.integers(0, count - 1))
    spec = ShardSpec.whole("w", shape) if dim is None else ShardSpec.split("w", shape, dim, index, count)
    size = math.prod(spec.local_shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    expected = [word(5, n) if n >= 0 else 0 for n in global_indices(spec)[start:stop].tolist()]
    assert random.words_of_part(5, spec, start, stop, CPU).tolist() == expected
