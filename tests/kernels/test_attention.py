"""Attention in tiles against the formula in float64, with every mask and option, alone and together."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.distributed.random import keep_slice
from megalm.kernels import attention as file
from megalm.kernels import launch, reference
from megalm.kernels.attention import flash_attention, flash_attention_gradients
from megalm.kernels.attention_arguments import kernel_arguments
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, normal, poisoned
from tests.shards import assert_close

# p = exp(x - lse) takes over the rounding of lse in fp32, near 4 here, where half a unit in the last place is 2.4e-7,
# and that of lse log2(e), as much again times ln 2: 4.1e-7 together, which one query does not average. Plain torch
# keeps p itself.
LSE_ROUNDING = 4.5e-7
SEED = 2**63 + 5
RATE = 0.3


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def qkv(
    B: int = 1, T: int = 70, S: int = 70, H: int = 2, G: int = 1, E: int = 40, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [normal(*shape, dtype=dtype) for shape in ((B, T, H, E), (B, S, G, E), (B, S, G, E))]


def finite_lse(function: Callable[..., Any], **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return attention with lse whose lse is 0 where nothing is seen: norms of -inf would say nothing."""

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(*inputs, return_lse=True, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    return run


def check(inputs: list[Tensor], floor: float = LSE_ROUNDING, **options: Any) -> None:
    with poisoned():
        assert_as_good_as_plain(
            finite_lse(flash_attention, **options),
            finite_lse(reference.flash_attention, **options),
            inputs,
            names=["q", "k", "v"],
            floor=floor,
        )


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Callable[[int, int, int], bool], **options: Any) -> Tensor:
    """Return attention one score at a time: what the oracle itself is held against."""
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                place = t + S - T
                keys = [s for s in range(S) if seen(b, place, s)]
                scores = []
                for s in keys:
                    x = q[b, t, h] @ k[b, s, h // (H // G)] * 0.4
                    if "softcap" in options:
                        x = options["softcap"] * torch.tanh(x / options["softcap"])
                    scores.append(x - options["slopes"][h] * abs(place - s) if "slopes" in options else x)
                for s, p in zip(keys, torch.softmax(torch.stack(scores), 0) if keys else (), strict=True):
                    out[b, t, h] += p * v[b, s, h // (H // G)]
    return out


DOCUMENTS = [range(0, 2), range(2, 2), range(2, 6)]


@pytest.mark.parametrize("queries", [4, 6, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_the_oracle_is_its_formula(queries: int, causal: bool) -> None:
    q, k, v = (x.double() for x in qkv(2, queries, 6, 4, 2, 3))
    slopes, lengths = normal(4), int32(3, 6)

    def run(batch: int = 2, **options: Any) -> Tensor:
        return reference.flash_attention(q[:batch], k[:batch], v[:batch], causal=causal, scale=0.4, **options)

    def seen(b: int, t: int, s: int) -> bool:
        return s <= t or not causal

    def in_window(b: int, t: int, s: int) -> bool:
        return seen(b, t, s) and abs(t - s) < 2

    def in_length(b: int, t: int, s: int) -> bool:
        return seen(b, t, s) and s < int(lengths[b])

    def in_document(b: int, t: int, s: int) -> bool:
        return seen(b, t, s) and any(t in document and s in document for document in DOCUMENTS)

    assert_close(run(), plain(q, k, v, seen))
    assert_close(run(window=2), plain(q, k, v, in_window))
    assert_close(run(key_lengths=lengths), plain(q, k, v, in_length))
    assert_close(run(softcap=0.7, alibi_slopes=slopes), plain(q, k, v, seen, softcap=0.7, slopes=slopes.double()))
    if queries == 6:
        packed = run(batch=1, cu_seqlens=int32(0, 2, 2, 6))
        assert_close(packed, plain(q[:1], k[:1], v[:1], in_document))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("causal", "heads", "groups"), [(True, 2, 1), (False, 2, 2)])
def test_values_and_gradients_in_every_dtype(dtype: torch.dtype, causal: bool, heads: int, groups: int) -> None:
    check(qkv(H=heads, G=groups, dtype=dtype), causal=causal)


@pytest.mark.parametrize("features", [1, 8, 32, 64, 80, 96, 160, 192, 256])
def test_every_head_size(features: int) -> None:
    check(qkv(T=35, S=35, H=1, E=features), causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (40, 70), (70, 40), (33, 97)])
@pytest.mark.parametrize("causal", [True, False])
def test_other_numbers_of_queries_than_of_keys(queries: int, keys: int, causal: bool) -> None:
    check(qkv(T=queries, S=keys), causal=causal)


@pytest.mark.parametrize("window", [1, 5, 33, 64, 1000])
def test_windows(window: int) -> None:
    # A position that sees itself alone has gradients of 0 exactly: what is left of sums of 40 products counts whole.
    floor = 3e-6 if window == 1 else LSE_ROUNDING
    check(qkv(), floor, causal=True, window=window)
    check(qkv(T=50, S=70), floor, causal=False, window=window)


MANY: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"B": 2, "H": 2, "G": 2}, {"causal": False, "key_lengths": (0, 37)}),
    ({"B": 2}, {"causal": True, "key_lengths": (70, 33), "window": 20, "dropout": RATE}),
    ({}, {"causal": True, "cu_seqlens": (0, 3, 40, 40, 70)}),
    ({}, {"causal": False, "cu_seqlens": (0, 32, 70), "window": 9, "softcap": 0.8}),
    ({"T": 72, "S": 72}, {"causal": True, "cu_seqlens": (0, 1, 66, 72), "dropout": RATE, "alibi_slopes": True}),
    ({"H": 4, "G": 2}, {"causal": True, "softcap": 0.5, "dropout": RATE, "scale": 0.9}),
    ({}, {"causal": True, "alibi_slopes": True, "window": 40}),
    ({"T": 33, "S": 71}, {"causal": False, "alibi_slopes": True, "softcap": 2.0, "dropout": RATE}),
    (
        {"T": 44, "S": 68, "E": 80},
        {"causal": True, "dropout": RATE, "window": 30, "alibi_slopes": True, "softcap": 1.0},
    ),
    ({"T": 70, "S": 41}, {"causal": True, "dropout": RATE, "key_lengths": (17,), "scale": -0.3}),
    ({"T": 30, "S": 30, "H": 4}, {"causal": True, "scale": 0.0}),
]


@pytest.mark.parametrize(("sizes", "options"), MANY, ids=lambda value: "-".join(value) if "causal" in value else "")
def test_options_together(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    given = dict(options)
    for name in ("cu_seqlens", "key_lengths"):
        if name in given:
            given[name] = int32(*given[name])
    if "alibi_slopes" in given:
        given["alibi_slopes"] = normal(sizes.get("H", 2)).abs()
    if "dropout" in given:
        given.update(seed=SEED, dropout_origin=(2**20, 3, 12))
    check(qkv(**sizes), **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_options_in_half_precision(dtype: torch.dtype) -> None:
    check(
        qkv(B=2, T=40, S=68, H=2, dtype=dtype),
        causal=True,
        window=50,
        softcap=2.0,
        alibi_slopes=normal(2).abs(),
        key_lengths=int32(68, 50),
        dropout=RATE,
        seed=3,
    )


def test_large_scores_do_not_overflow() -> None:
    q, k, v = qkv(T=40, S=40)
    # The rounding of an lse of up to 4096: half a unit in the last place of fp32.
    check([100.0 * q, k, v], floor=2.0**-12, causal=True, scale=1.0)
    check([100.0 * q, k, v], floor=2.0**-18, causal=True, scale=1.0, softcap=50.0)


def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient() -> None:
    inputs = [x.requires_grad_() for x in qkv(B=2, T=40, S=36)]
    with poisoned():
        out, lse = flash_attention(*inputs, causal=True, key_lengths=int32(0, 30), return_lse=True)
        gradients = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.full_like(lse, math.nan)))
    blind = torch.zeros(2, 40, dtype=torch.bool)
    blind[0], blind[1, :4] = True, True
    assert torch.equal((lse == -math.inf).cpu(), blind[:, None, :].expand(2, 2, 40))
    assert not out[blind].any() and not gradients[0][blind].any()
    assert not any(gradient[0].any() for gradient in gradients), "sample 0 has no visible key"
    assert not gradients[1][1, 30:].any() and not gradients[2][1, 30:].any()


def test_keys_beyond_the_length_may_hold_anything() -> None:
    q, k, v = qkv(B=2)
    lengths = int32(20, 45)
    expected = torch.autograd.grad(
        flash_attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), causal=False, key_lengths=lengths)
        .square()
        .sum(),
        (q, k, v),
    )
    k, v = (x.detach().clone() for x in (k, v))
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = math.nan, math.inf
    out = flash_attention(q, k.requires_grad_(), v.requires_grad_(), causal=False, key_lengths=lengths)
    for gradient, right in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(gradient, right)


@pytest.mark.parametrize(
    "options", [{"window": 8}, {"cu_seqlens": int32(0, 32, 64, 96)}, {"cu_seqlens": int32(0, 64, 64, 96), "window": 3}]
)
def test_tiles_that_no_query_sees_are_not_read(options: dict[str, Any]) -> None:
    """NaN at the keys of the first tile would spread to whatever reads it, and NaN queries to the keys' gradients."""
    if DEVICE.type != "cpu":
        pytest.skip("the tiles of a GPU are larger")
    q, k, v = qkv(T=96, S=96)
    k[:, :32], v[:, :32], q[:, :32] = math.nan, math.nan, math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attention(*inputs, causal=True, **options)
    assert out[:, 64:].isfinite().all()
    for gradient in torch.autograd.grad(out, inputs, out.detach().nan_to_num(0.0)):
        assert gradient[:, 64:].isfinite().all()
    out = flash_attention(q, k, v.detach().flip(1), causal=False, **options)
    assert not out[:, :32].isfinite().any()


@pytest.mark.parametrize("keys", [64, 61])
@pytest.mark.parametrize("origin", [None, (2**21, 3, 9)])
def test_masks_are_the_part_of_the_whole_tensors_mask(keys: int, origin: tuple[int, int, int] | None) -> None:
    """With q = 0 or k = 0 all p are equal, and with the identity for one tensor a result shows every element."""
    T = 40
    first_sample, first_head, all_heads = origin or (0, 0, 2)
    whole = (first_sample + 2, all_heads, T, keys)
    part = (first_sample, first_head, 0, 0), (2, 2, T, keys)
    kept_BHTS = keep_slice(SEED, RATE, whole, *part, torch.device("cpu"))
    assert torch.equal(
        reference._attention_dropout_scale(SEED, RATE, (2, 2, T, keys), origin, (0, 0, T, keys), normal(1)) > 0,
        kept_BHTS,
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=False, dropout=RATE, seed=SEED, dropout_origin=origin)

    def eye(rows: int) -> Tensor:
        return torch.eye(rows, 64, device=DEVICE)[None, :, None].repeat(2, 1, 2, 1).requires_grad_()

    zero_q, zero_k = (torch.zeros(2, rows, 2, 64, device=DEVICE, requires_grad=True) for rows in (T, keys))
    ones = torch.zeros(2, keys, 2, 64, device=DEVICE)
    ones[..., 0] = 1.0
    out = run(zero_q, zero_k, eye(keys))
    assert torch.equal((out > 0)[..., :keys].transpose(1, 2).cpu(), kept_BHTS), "forward"
    values = ones.clone().requires_grad_()
    (dv,) = torch.autograd.grad(run(zero_q, zero_k, values), values, eye(T).detach())
    assert torch.equal((dv > 0)[..., :T].permute(0, 2, 3, 1).cpu(), kept_BHTS), "dv"
    (dq,) = torch.autograd.grad(run(zero_q, eye(keys), ones)[..., 0].sum(), zero_q)
    assert torch.equal((dq > 0)[..., :keys].transpose(1, 2).cpu(), kept_BHTS), "dq"
    (dk,) = torch.autograd.grad(run(eye(T), zero_k, ones)[..., 0].sum(), zero_k)
    assert torch.equal((dk > 0)[..., :T].permute(0, 2, 3, 1).cpu(), kept_BHTS), "dk"


def test_parts_over_the_keys_merge_by_lse_to_the_whole() -> None:
    """Ring attention's merge, whose gradient goes through lse (Liu et al. 2023)."""
    inputs = [x.requires_grad_() for x in qkv(T=40, S=80)]
    q, k, v = inputs
    whole, whole_lse = flash_attention(q, k, v, causal=False, return_lse=True)
    parts = [flash_attention(q, k[:, i:j], v[:, i:j], causal=False, return_lse=True) for i, j in ((0, 30), (30, 80))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp().transpose(1, 2).unsqueeze(-1) for out, part in parts)
    assert isinstance(merged, Tensor)
    assert_close(merged, whole, "out", 1e-6)
    assert_close(lse, whole_lse, "lse", 1e-6)
    dout = normal(*whole.shape)
    both = (torch.autograd.grad(x, inputs, dout, retain_graph=True) for x in (merged, whole))
    for name, one, other in zip(("dq", "dk", "dv"), *both, strict=True):
        assert_close(one, other, name, 2e-6)


PARTS: list[dict[str, Any]] = [
    {"window": 20, "softcap": 2.0, "dropout": RATE, "seed": SEED, "dropout_origin": (1, 2, 5)},
    {"alibi": True, "documents": True},
    {"window": 33, "documents": True, "keys": 110},
    {"dropout": RATE, "seed": SEED, "keys": 98},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", PARTS, ids=lambda options: ", ".join(options))
def test_a_part_of_the_matrix_is_as_in_the_whole(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Cut anywhere: results merge by lse, and the parts' gradients, made with the whole's lse, add up."""
    options = {**options, "causal": True}
    T, S = 96, options.pop("keys", 96)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.tensor((0.3, 0.05), device=DEVICE)
    numbers = torch.arange(S, device=DEVICE).div(37, rounding_mode="floor") if options.pop("documents", False) else None
    q, k, v = qkv(T=T, S=S, E=32, dtype=dtype)

    def of(rows: range, columns: range) -> dict[str, Any]:
        own = {"within": (rows.start, columns.start, T, S), **options}
        if numbers is not None:
            own["documents"] = numbers[S - T :][rows.start : rows.stop], numbers[columns.start : columns.stop]
        return own

    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*inputs, return_lse=True, **of(range(T), range(S)))
    dout, dlse = normal(*out.shape, dtype=dtype), normal(*lse.shape, dtype=lse.dtype)
    expected = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for rows in (range(0, 24), range(24, 71), range(71, T)):
        m = slice(rows.start, rows.stop)
        merged, sums = torch.zeros_like(out[:, m]), torch.zeros_like(lse[..., m])
        for columns in (range(0, 48), range(48, 60), range(60, S)):
            n = slice(columns.start, columns.stop)
            part, part_lse = flash_attention(q[:, m], k[:, n], v[:, n], return_lse=True, **of(rows, columns))
            share = (part_lse - lse[..., m]).exp()
            merged += part * share.transpose(1, 2)[..., None]
            sums += share
            given = (dout[:, m], dlse[..., m], out[:, m], lse[..., m], q[:, m], k[:, n], v[:, n])
            found = flash_attention_gradients(*given, **of(rows, columns))
            for total, piece, at in zip(gradients, found, (m, n, n), strict=True):
                total[:, at] += piece
        assert_close(merged, out[:, m], "out", 2e-6)
        assert_close(sums, torch.ones_like(sums), "probabilities", 2e-6)
    for name, total, wanted in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert_close(total, wanted, name, 3e-6 if dtype is torch.float32 else 1e-13)


def test_gradients_of_lse_alone_and_of_out_alone() -> None:
    inputs = [x.requires_grad_() for x in qkv(T=40, S=40)]
    out, lse = flash_attention(*inputs, causal=True, return_lse=True)
    dout, dlse = normal(*out.shape), normal(*lse.shape)
    both = torch.autograd.grad((out, lse), inputs, (dout, dlse), retain_graph=True)
    from_out = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    from_lse = torch.autograd.grad(lse, inputs, dlse, allow_unused=True)
    for name, total, one, other in zip(("dq", "dk", "dv"), both, from_out, from_lse, strict=True):
        assert other is not None
        assert_close(one + other, total, name, 1e-6)


@pytest.mark.parametrize(("heads", "groups", "tokens"), [(4, 1, 30), (4, 2, 70)])
def test_two_runs_give_the_same_bits(heads: int, groups: int, tokens: int) -> None:
    """The first case splits the heads of a group over programs, whose sums are added afterwards."""
    inputs = [x.requires_grad_() for x in qkv(T=tokens, S=tokens, H=heads, G=groups)]
    if DEVICE.type == "cpu":
        assert file._shares(1, 4, launch.processors(DEVICE)) == 4

    def run() -> tuple[Tensor, ...]:
        out = flash_attention(*inputs, causal=True, dropout=RATE, seed=SEED)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_strided_inputs_and_expanded_gradients() -> None:
    packed = normal(2, 40, 4, 48)
    views = [packed[..., :40].narrow(2, 0, 2), packed[..., 8:].narrow(2, 2, 1), packed.flip(3)[:, :, 3:, :40]]
    views.append(normal(2, 1, 40, 40).transpose(1, 2))  # heads first in memory
    views.append(normal(2, 40, 1, 40).transpose(1, 3).contiguous().transpose(1, 3))  # features not side by side
    for q, k, v in ((views[0], views[1], views[2]), (views[0], views[3], views[4])):
        results = []
        for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = flash_attention(*leaves, causal=True)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_offsets_beyond_32_bits() -> None:
    """Samples 2^31 elements apart, and rows so far apart that the last ones lie beyond 2^31."""
    far = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    apart = 2**23 - 16
    for shape, strides, options in (
        ((2, 40, 1, 32), (2**31, 96, 96, 1), {"causal": True}),
        ((1, 257, 1, 32), (1, apart, 96, 1), {"causal": True, "window": 4}),
    ):
        strided = [far.as_strided(shape, strides, 32 * i).copy_(normal(*shape, dtype=torch.float16)) for i in range(3)]
        results = []
        for inputs in (strided, [x.contiguous() for x in strided]):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = flash_attention(*leaves, **options)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_empty_inputs() -> None:
    for sizes in ({"B": 0}, {"T": 0}, {"S": 0}, {"H": 0}):
        inputs = [x.requires_grad_() for x in qkv(**{"T": 3, "S": 3, **sizes})]
        out, lse = flash_attention(*inputs, causal=False, return_lse=True)
        assert out.shape == inputs[0].shape and not out.any()
        assert (lse == -math.inf).all()
        out.sum().backward()
        assert all(x.grad is not None and not x.grad.any() for x in inputs)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv(T=40, S=72)
    options: dict[str, Any] = {
        "causal": True,
        "window": 30,
        "softcap": 2.0,
        "alibi_slopes": normal(2).abs(),
        "key_lengths": int32(60),
        "dropout": RATE,
        "seed": SEED,
        "dropout_origin": (3, 1, 5),
        "return_lse": True,
    }
    expected = flash_attention(*inputs, **options)
    packed = qkv(T=40, S=40)
    expected_packed = flash_attention(*packed, causal=True, cu_seqlens=int32(0, 7, 40))
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(flash_attention(*inputs, **options), expected)
    torch.testing.assert_close(flash_attention(*packed, causal=True, cu_seqlens=int32(0, 7, 40)), expected_packed)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"window": 0}, "window=0 sees nothing"),
    ({"softcap": 0.0}, r"softcap=0\.0 is no bound"),
    ({"dropout": 0.1}, r"dropout=0\.1 without a seed"),
    ({"dropout": 1.0, "seed": 1}, r"dropout=1\.0 is no rate"),
    ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes \(3,\) in torch\.float32; give fp32 \[2\]"),
    ({"key_lengths": torch.ones(2, dtype=torch.int64)}, r"key_lengths \(2,\) in torch\.int64; give int32 \[2\]"),
    ({"cu_seqlens": int32(0, 4)}, r"cu_seqlens with .*documents lie in one row"),
    ({"documents": (int32(0), int32(0))}, r"documents \(\(1,\), \(1,\)\) for .*of one row"),
    ({"documents": (int32(0), int32(0)), "cu_seqlens": int32(0, 4)}, r"cu_seqlens .*documents lie in one row"),
    ({"cu_seqlens": int32(0)}, r"cu_seqlens \(1,\) in torch\.int32; give int32 \[documents \+ 1\]"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(*qkv(2, 4, 4), causal=True, **options)


def test_wrong_tensors_are_named() -> None:
    q, k, v = qkv(2, 4, 4, 2, 1, 8)
    for tensors, message in (
        ((q, k, v[:1]), r"attention of q \(2, 4, 2, 8\).*give q \[B, T, H, E\]"),
        ((torch.cat((q, k), 2), *(torch.cat((x, x), 2) for x in (k, v))), "3 query heads do not share 2 key heads"),
        ((q, k.half(), v), r"q in torch\.float32, k in torch\.float16"),
        ([x.repeat(1, 1, 1, 33) for x in (q, k, v)], "head size 264; sizes from 1 to 256"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attention(*tensors, causal=True)


def test_the_ops_are_good_citizens_of_torch() -> None:
    inputs = [x.requires_grad_() for x in qkv(T=5, S=6, E=8)]
    rest = (normal(2), None, int32(4), int32(0, 0, 1, 1, 1), int32(0, 0, 0, 0, 1, 1))
    rest += (True, 3, 0.5, 2.0, 0.2, 17, [0, 0, 2], [5, 3, 20, 22])
    torch.library.opcheck(file._forward_op, (*inputs, *rest))
    q, k, v = (x.detach() for x in inputs)
    out, lse = file._forward_op(q, k, v, *rest)
    torch.library.opcheck(file._backward_op, (normal(*out.shape), normal(*lse.shape), out, lse, q, k, v, *rest))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True, dropout=0.2, seed=3)
        return out.square().sum() + flash_attention(q, k, v, causal=False, window=3).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("features", "dtype"), [(64, torch.float16), (128, torch.bfloat16)], ids=str)
def test_the_specialized_kernel_gives_the_same(
    features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type != "cpu" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for sm_90")
    settings, served = launch.settings, []
    monkeypatch.setattr(
        launch, "settings", lambda *what: {**settings(*what), **({"specialized": True} if what[1] == "forward" else {})}
    )
    monkeypatch.setattr(file.attention_hopper, "launch_forward", spy(file.attention_hopper.launch_forward, served))
    check(qkv(T=128, S=256, H=2, E=features, dtype=dtype), causal=True)
    check(qkv(T=256, S=128, H=2, E=features, dtype=dtype), causal=False)
    assert len(served) == 2
    check(qkv(T=120, S=128, H=1, E=features, dtype=dtype), causal=False)
    assert len(served) == 2


def test_the_specialized_kernel_serves_whole_tiles_of_its_settings() -> None:
    arguments = kernel_arguments(
        *qkv(T=192, S=192, H=1, E=64, dtype=torch.float16),
        *[None] * 5,
        True,
        0,
        1.0,
        0.0,
        0.0,
        0,
        [0, 0, 1],
        [0, 0, 192, 192],
    )
    arguments["FOLD"] = True
    sizes = ((64, 64), (64, 128), (128, 64))
    assert [file.attention_hopper.serves(arguments, {"BLOCK_M": m, "BLOCK_N": n}) for m, n in sizes] == [
        True,
        False,
        False,
    ]


def test_memory_for_descriptors_is_provided_once_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    provided: list[Any] = []
    monkeypatch.setattr("triton.set_allocator", provided.append)

    def launch_twice() -> None:
        file.attention_hopper._provide_memory()
        file.attention_hopper._provide_memory()

    contextvars.Context().run(launch_twice)
    assert len(provided) == 1
    contextvars.Context().run(launch_twice)  # as in a thread of autograd, where Triton knows of no allocator yet
    assert len(provided) == 2


def spy(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the settings of a GPU's launch table")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [32, 64, 80, 128, 192, 256])
def test_a_gpus_own_tiles(dtype: torch.dtype, features: int) -> None:
    for options in ({"causal": True}, {"causal": True, "window": 300, "dropout": 0.1, "seed": 1}, {"causal": False}):
        check(qkv(2, 1000, 1000, 4, 2, features, dtype), **options)
    check(
        qkv(2, 700, 1000, 4, 2, features, dtype),
        causal=False,
        softcap=5.0,
        alibi_slopes=normal(4).abs(),
        key_lengths=int32(900, 123),
        dropout=0.1,
        seed=1,
    )
