"""AdamW of many tensors in one launch: to the bit what the reference computes, and what torch.optim.AdamW means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm.distributed.random import philox_4x32
from megalm.kernels import adamw as file
from megalm.kernels import launch, reference
from megalm.kernels.adamw import fused_adamw_
from tests.kernels.checks import (
    DEVICE,
    DTYPES,
    assert_error_at_most_twice,
    fresh_seed,
    normal,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = ((1,), (0,), (3, 41), (1030,), (2051,), (2, 0, 5), (), (2,))
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
Lists = dict[str, list[Tensor]]


def unaligned(tensor: Tensor) -> Tensor:
    """Return the tensor as a view that starts one element into its storage."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def make(
    sizes: Sequence[tuple[int, ...]] = SIZES,
    weight: torch.dtype = FP32,
    gradient: torch.dtype = FP32,
    state: torch.dtype = FP32,
    masters: bool = False,
) -> Lists:
    """Return the arguments of a step in the middle of training; every second tensor is unaligned."""
    kinds = {"weights": weight, "gradients": gradient, "exp_avgs": state, "exp_avg_sqs": state}
    kinds |= {"masters": FP32} if masters else {}
    lists: Lists = {name: [normal(*size, dtype=kind) for size in sizes] for name, kind in kinds.items()}
    lists["exp_avg_sqs"] = [v.square() for v in lists["exp_avg_sqs"]]
    if masters:
        lists["weights"] = [master.to(weight) for master in lists["masters"]]
    return {name: [unaligned(x) if i % 2 else x for i, x in enumerate(xs)] for name, xs in lists.items()}


def assert_same(actual: Lists, expected: Lists) -> None:
    for name, tensors in actual.items():
        for number, (one, other) in enumerate(zip(tensors, expected[name], strict=True)):
            assert one.dtype is other.dtype
            assert torch.equal(one, other), f"{name}[{number}] of {tuple(one.shape)}: {(one != other).sum()} differ"


def assert_agrees(lists: Lists, **options: Any) -> Lists:
    """Run a kernel step on the lists and fail unless each number is that of the reference; return what was before."""
    before, expected = copy.deepcopy(lists), copy.deepcopy(lists)
    reference.fused_adamw_(**expected, **OPTIONS | options)
    fused_adamw_(**lists, **OPTIONS | options)
    assert_same(lists, expected)
    return before


@pytest.mark.parametrize(
    ("weight", "gradient", "state", "masters"),
    [
        *((FP32, gradient, FP32, False) for gradient in DTYPES),
        *((BF16, gradient, FP32, masters) for gradient in (BF16, FP32) for masters in (False, True)),
        *((FP16, FP16, FP32, masters) for masters in (False, True)),
        (BF16, BF16, BF16, True),
        (FP32, FP32, BF16, False),
    ],
    ids=str,
)
def test_every_number_is_that_of_the_reference(
    weight: torch.dtype, gradient: torch.dtype, state: torch.dtype, masters: bool
) -> None:
    lists = make(SIZES, weight, gradient, state, masters)
    before = assert_agrees(lists)
    assert_same({"gradients": lists["gradients"]}, before)
    assert not torch.equal(lists["exp_avgs"][4], before["exp_avgs"][4])
    if masters:
        assert_same({"weights": lists["weights"]}, {"weights": [master.to(weight) for master in lists["masters"]]})


def plain_adamw(weights: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype) -> list[list[Tensor]]:
    """Return weights and both states after torch.optim.AdamW in `dtype`; every third weight is not decayed."""
    parameters = [torch.nn.Parameter(weight.to(dtype, copy=True)) for weight in weights]
    groups = [
        {"params": [p for i, p in enumerate(parameters) if (i % 3 == 0) is bare], "weight_decay": 0.0 if bare else 0.3}
        for bare in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(dtype)
        optimizer.step()
    states = ([optimizer.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
    return [[p.detach() for p in parameters], *states]


@pytest.mark.parametrize("masters", [False, True])
def test_ten_steps_are_those_of_torch(masters: bool) -> None:
    low = BF16 if masters else FP32
    start, gradients = make()["weights"], [make(gradient=low)["gradients"] for _ in range(10)]
    exact = plain_adamw(start, gradients, torch.float64)
    plain = plain_adamw(start, gradients, FP32)
    held = [weight.clone() for weight in start]
    weights = [weight.to(low) for weight in start] if masters else held
    states = [[torch.zeros_like(weight) for weight in held] for _ in range(2)]
    decays = [0.0 if i % 3 == 0 else 0.3 for i in range(len(held))]
    for step, given in enumerate(gradients, start=1):
        options = OPTIONS | {"weight_decay": decays, "step": step, "masters": held if masters else None}
        fused_adamw_(weights, given, *states, **options)
    rows = zip(("weights", "exp_avgs", "exp_avg_sqs"), (held, *states), plain, exact, strict=True)
    for name, *three in rows:
        whole = [torch.cat([x.flatten() for x in tensors]) for tensors in three]
        assert_error_at_most_twice(name, *whole)
    for weight, master in zip(weights, held, strict=True):
        assert torch.equal(weight, master.to(low))


def test_float64_is_left_to_the_reference_which_is_torchs_adamw() -> None:
    start, gradients = make()["weights"], [make()["gradients"] for _ in range(3)]
    expected = plain_adamw(start, gradients, torch.float64)
    weights = [weight.double() for weight in start]
    states = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    decays = [0.0 if i % 3 == 0 else 0.3 for i in range(len(weights))]
    for step, given in enumerate(gradients, start=1):
        fused_adamw_(weights, [g.double() for g in given], *states, **OPTIONS | {"weight_decay": decays, "step": step})
    torch.testing.assert_close([weights, *states], expected, rtol=1e-12, atol=1e-14)


class Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.launches += 1
        return self.kernel[grid]


def test_thousands_of_tensors_take_one_launch_and_a_table_that_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counting(file._adamw)
    monkeypatch.setattr(file, "_adamw", kernel)
    every = 1 if DEVICE.type == "cuda" else 7  # the interpreter takes 8 ms a program, and none for an empty tensor
    sizes = [(1 + i % 5 if i % every == 0 else 0,) for i in range(2101)]
    lists = make(sizes, BF16, BF16, masters=True)
    file._table.cache_clear()
    assert_agrees(lists)
    assert kernel.launches == 1 and file._table.cache_info().misses == 1
    few = {name: tensors[:29:7] for name, tensors in lists.items()}
    for step in (4, 5):
        assert_agrees(few, step=step)
    assert kernel.launches == 3 and file._table.cache_info().misses == 2
    assert_agrees(few, weight_decay=[0.1, 0.2, 0.3, 0.4, 0.5])
    few["gradients"] = [gradient.clone() for gradient in few["gradients"]]
    assert_agrees(few)
    assert file._table.cache_info().misses == 4


def test_tensors_of_several_dtypes_share_a_call() -> None:
    kinds = [make(SIZES, *dtypes) for dtypes in ((BF16, BF16), (FP32, FP32), (BF16, FP32), (BF16, BF16))]
    mixed = {name: [x for kind in kinds for x in kind[name]] for name in kinds[0]}
    assert_agrees(mixed, weight_decay=[0.01 * i for i in range(len(mixed["weights"]))])
    assert_agrees(mixed, stochastic_rounding=True, seed=7)


@pytest.mark.parametrize("scale", [0.25, 3e-6, torch.tensor(1e-3), torch.tensor([7.0])])
def test_the_gradients_are_scaled(scale: Tensor | float) -> None:
    lists = make(gradient=BF16)
    assert_agrees(lists, gradient_scale=scale.to(DEVICE) if isinstance(scale, Tensor) else scale)


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_scale_that_is_no_number_changes_nothing(scale: float, on_device: bool) -> None:
    for options in ({"weight": FP32}, {"weight": BF16, "masters": True}):
        lists = make(SIZES, **options)
        before = assert_agrees(lists, gradient_scale=torch.tensor(scale, device=DEVICE) if on_device else scale)
        assert_same(lists, before)


def test_a_gradient_that_is_no_number_shows_in_its_element_alone() -> None:
    for rounding in (False, True):
        lists = make([(2051,)], BF16, BF16)
        lists["gradients"][0][[5, 2050]] = torch.tensor([math.nan, math.inf], dtype=BF16, device=DEVICE)
        fused_adamw_(**lists, **OPTIONS, stochastic_rounding=rounding)
        bad = lists["weights"][0].isnan().nonzero().flatten().tolist()
        assert bad == [5, 2050]


def test_strided_gradients_and_nothing_beside_the_tensors() -> None:
    lists = make([(5, 9), (6, 7), (40,)])
    lists["gradients"] = [normal(9, 5).T, normal(6, 14)[:, ::2], normal(1).expand(40)]
    guarded = {name: [torch.full((x.numel() + 20,), 7.0, device=DEVICE) for x in lists[name]] for name in lists}
    inner = {name: [g[10:-10].view(x.shape) for g, x in zip(guarded[name], lists[name], strict=True)] for name in lists}
    for name, views in inner.items():
        for view, x in zip(views, lists[name], strict=True):
            view.copy_(x)
    inner["gradients"] = lists["gradients"]
    fused_adamw_(**inner, **OPTIONS)
    reference.fused_adamw_(**lists, **OPTIONS)
    assert_same(inner, lists)
    for buffers in guarded.values():
        assert all(bool((buffer[:10] == 7.0).all() and (buffer[-10:] == 7.0).all()) for buffer in buffers)


@pytest.mark.parametrize("seed", [0, 5, 2**63 + 12345, 2**64 - 1])
def test_stochastic_rounding_takes_the_bits_of_the_reference(seed: int) -> None:
    lists = make(SIZES, BF16, BF16, BF16 if seed == 5 else FP32)
    nearest = copy.deepcopy(lists)
    assert_agrees(lists, stochastic_rounding=True, seed=seed, step=1)
    reference.fused_adamw_(**nearest, **OPTIONS | {"step": 1})
    assert not torch.equal(nearest["weights"][4], lists["weights"][4])


@triton.jit(do_not_specialize=["start", "key", "number", "step"])
def rounded(out, value, start, key, number, step, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    bits = file._round_stochastically(tl.load(value + n), start.to(tl.int64), key, number, step, BLOCK)
    tl.store(out + n, bits)


def expected_rounding(value: Tensor, start: int, key: int, number: int, step: int) -> Tensor:
    """Return the rounding as the module's text has it, made with the Philox of megalm.distributed."""
    counter = start // 4 + torch.arange(len(value) // 4)
    several = [counter & 0xFFFFFFFF, counter >> 32, *(torch.full_like(counter, x) for x in (number, step))]
    words = torch.stack(philox_4x32((several[0], several[1], several[2], several[3]), key), dim=1).flatten()
    bits = (value.cpu().view(torch.int32).long() & 0xFFFFFFFF) + (words >> 16)
    return (bits & 0xFFFF0000).to(torch.uint32).view(torch.float32)


def test_the_random_bits_are_those_of_the_text_for_any_place_of_an_element() -> None:
    value, out = normal(256), torch.empty(256, device=DEVICE)
    for start, number, step in ((0, 0, 1), (1024, 70000, 2**32 - 1), (2**34 - 128, 3, 2**31), (2**40, 2**31, 16)):
        key = 2**63 + fresh_seed()
        rounded[(1,)](out, value, start, launch.signed_key(key), number, step, BLOCK=256)
        assert torch.equal(out.cpu(), expected_rounding(value, start, key, number, step))
    ones = torch.ones(1000, device=DEVICE) + 2.0**-9
    draws = [reference._round_stochastically(ones, number, step, 5) for number, step in ((0, 1), (1, 1), (0, 2))]
    expected = expected_rounding(ones, 0, 5, 1, 1)
    assert torch.equal(draws[1].cpu(), expected) and len({tuple(draw.tolist()) for draw in draws}) == 3


def test_stochastic_rounding_keeps_what_is_no_number() -> None:
    """A NaN whose bits are all ones would become a zero by the carry; no random bits lead from infinity anywhere."""
    bits = torch.tensor([2**31 - 1, -1, 0x7F800000, 0x7F800000 - 2**31], dtype=torch.int32, device=DEVICE)
    value, out = bits.view(FP32).repeat(64), torch.empty(256, device=DEVICE)
    rounded[(1,)](out, value, 0, 5, 1, 1, BLOCK=256)
    for result in (out, reference._round_stochastically(value, 1, 1, 5)):
        assert torch.equal(result.isnan(), value.isnan())
        assert torch.equal(result[2::4], value[2::4]) and torch.equal(result[3::4], value[3::4])


@pytest.mark.parametrize("fraction", [1 / 16, 0.5, 0.875])
def test_stochastic_rounding_is_right_on_average(fraction: float) -> None:
    """Weights of 1 go down by a fraction of the distance to the next bf16; the bound is seven standard deviations.

    A binomial number of 2^15 draws is that far off with a probability below 1e-10.
    """
    count, distance = 2**15, 2.0**-8
    ones = torch.ones(count, device=DEVICE)
    weights, gradients = [ones.bfloat16()], [ones.clone()]
    options = OPTIONS | {"lr": fraction * distance, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    states = [[torch.zeros_like(ones)] for _ in range(2)]
    fused_adamw_(weights, gradients, *states, **options, stochastic_rounding=True, seed=fresh_seed())
    assert set(weights[0].tolist()) <= {1.0, 1.0 - distance}
    down = int((weights[0] < 1.0).sum())
    assert abs(down - fraction * count) <= 7.0 * math.sqrt(count * fraction * (1.0 - fraction))


def test_blocks_beyond_32_bits_of_elements_are_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last block of huge tensors is worked on, and few of their pages are ever touched."""
    size = 2**31 + 700
    huge = {name: [torch.empty(size, dtype=BF16, device=DEVICE)] for name in make([()], masters=False)}
    ends = {name: [tensors[0][2**31 :]] for name, tensors in huge.items()}
    small = make([(700,)], BF16, BF16, BF16)
    for name, tensors in ends.items():
        tensors[0].copy_(small[name][0])
    table = file._table

    def last_block_alone(*arguments: Any) -> tuple[Tensor, list[Any]]:
        rows, launches = table(*arguments)
        return rows, [each._replace(entries=each.entries[-1:]) for each in launches]

    monkeypatch.setattr(file, "_table", last_block_alone)
    fused_adamw_(**huge, **OPTIONS)
    reference.fused_adamw_(**small, **OPTIONS)
    assert_same(ends, small)


def test_parameters_that_want_gradients_are_updated_and_marked_as_changed() -> None:
    lists = make([(40,)])
    weight = torch.nn.Parameter(lists["weights"][0].clone())
    versions = [tensor._version for tensor in (weight, *lists["exp_avgs"], *lists["exp_avg_sqs"])]
    fused_adamw_([weight], lists["gradients"], lists["exp_avgs"], lists["exp_avg_sqs"], **OPTIONS)
    assert weight.requires_grad and weight.is_leaf and not torch.equal(weight, lists["weights"][0])
    changed = [tensor._version for tensor in (weight, *lists["exp_avgs"], *lists["exp_avg_sqs"])]
    assert all(after > before for before, after in zip(versions, changed, strict=True))


def test_no_tensor_at_all_is_no_error() -> None:
    fused_adamw_([], [], [], [], **OPTIONS)
    fused_adamw_(**make([(0,), (3, 0)]), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\).*betas below 1"),
        ({"eps": math.inf}, "eps=inf"),
        ({"weight_decay": [0.1, -1.0]}, r"weight_decay=-1\.0; it is at least 0"),
        ({"step": 0}, "step=0; the first step is number 1"),
        ({"gradients": []}, "2 weights has 0 gradients; give one for each"),
        ({"weight_decay": [0.1]}, "2 weights has 1 weight_decay"),
        ({"masters": [torch.zeros(3)]}, "2 weights has 1 masters"),
        ({"exp_avgs": [torch.zeros(3), torch.zeros(5)]}, r"exp_avgs\[1\] has shape \(5,\)"),
        ({"exp_avgs": [torch.zeros(3), torch.zeros(4, device="meta")]}, r"exp_avgs\[1\] has shape \(4,\) on meta"),
        (
            {"exp_avg_sqs": [torch.zeros(6)[::2], torch.zeros(4)]},
            r"exp_avg_sqs\[0\] of shape \(3,\) has strides \(2,\)",
        ),
        ({"exp_avgs": [torch.zeros(3).half(), torch.zeros(4)]}, r"exp_avgs\[0\] is torch.float16; use fp32, or bf16"),
        ({"masters": [torch.zeros(3), torch.zeros(4)]}, r"masters\[0\] is torch.float32 for a weight of torch.float32"),
        ({"gradient_scale": torch.ones(2)}, r"gradient_scale of shape \(2,\)"),
        ({"gradient_scale": torch.ones(1).double()}, r"torch.float64; give one fp32 element"),
        ({"gradient_scale": torch.ones((), device="meta")}, "gradient_scale on meta, weights on cpu; give it on their"),
        ({"weights": [torch.zeros(3).half(), torch.zeros(4)], "stochastic_rounding": True}, "it is for bf16 weights"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    names = ("weights", "gradients", "exp_avgs", "exp_avg_sqs")
    arguments = {name: [torch.zeros(3), torch.zeros(4)] for name in names} | OPTIONS | change
    with pytest.raises(ValueError, match=message):
        fused_adamw_(**arguments)


def test_the_reference_serves_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = make(SIZES, BF16, BF16)
    other = copy.deepcopy(lists)
    fused_adamw_(**lists, **OPTIONS, stochastic_rounding=True, seed=3, gradient_scale=0.5)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    fused_adamw_(**other, **OPTIONS, stochastic_rounding=True, seed=3, gradient_scale=0.5)
    assert_same(lists, other)


def test_the_operation_is_registered_as_torch_wants_it() -> None:
    lists = make([(5,), (3, 4)], BF16, BF16, masters=True)
    scale = torch.ones((), device=DEVICE)
    numbers = (1.0, 0.01, 0.9, 0.95, 1e-8, [0.1, 0.0], 3, False, 5)
    torch.library.opcheck(torch.ops.megalm.adamw_.default, (*lists.values(), scale, *numbers))


def test_compiled_code_holds_the_operation() -> None:
    lists = make([(5,), (3, 4)], BF16, BF16, masters=True)
    expected = copy.deepcopy(lists)
    scale = torch.tensor(0.5, device=DEVICE)

    def step(lists: Lists, scale: Tensor) -> Tensor:
        fused_adamw_(**lists, **OPTIONS, gradient_scale=scale * 2.0)
        return lists["masters"][0] * 1.0

    result = torch.compile(step, fullgraph=True, backend="aot_eager")(lists, scale)
    assert torch.equal(result, step(expected, scale))
    assert_same(lists, expected)
