"""Products in fp8 against float64's of operands that are rounded here, by the definition of the formats."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.config.choices import CHOICES
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.pipeline_parallel.weight_gradients import WeightGradients, pay
from megalm.tensor_parallel.float8 import Float8Products
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tests.shards import fill, random_whole
from tests.worker_pool import WorkerPool

pytest.importorskip("torchao")

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
N, K, FEATURES = 48, 64, 32
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
"""Digits behind the binary point, the least exponent of numbers that have all of them, the largest number."""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


def rounded(x: Tensor, dim: int | None, kind: tuple[int, int, float]) -> Tensor:
    """Return x in float64 as 8 bits hold it, with a scale for each row along `dim` (None: one), a power of two."""
    digits, least, largest = kind
    x = x.double()
    top = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(largest / top)))
    exponent = torch.frexp(x * scale).exponent.double() - 1.0
    step = torch.exp2(exponent.clamp_min(least) - digits)
    return torch.round(x * scale / step) * step / scale


def operands(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return x [2, N / 2, K], w [F, K] and dy [2, N / 2, F] in bf16, each with numbers of very different sizes."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, N // 2, K), (FEATURES, K), (2, N // 2, FEATURES))
    parts = [torch.randn(s, generator=generator) * torch.exp(2.0 * torch.randn(s, generator=generator)) for s in shapes]
    x, w, dy = (part.to(torch.bfloat16).to(device) for part in parts)
    return x, w, dy


def expected_operands(recipe: str, x_NK: Tensor, w_FK: Tensor, dy_NF: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rounded operands of y, dx and dW."""
    if recipe == "tensorwise":
        x, w, dy = rounded(x_NK, None, E4M3), rounded(w_FK, None, E4M3), rounded(dy_NF, None, E5M2)
        yield from ((x, w.t()), (dy, w), (dy.t(), x))
        return
    yield rounded(x_NK, 1, E4M3), rounded(w_FK, 1, E4M3).t()
    whole = recipe == "rowwise_with_gw_hp"
    yield rounded(dy_NF, 1, E4M3), rounded(w_FK, None if whole else 0, E4M3)
    yield (dy_NF.double().t(), x_NK.double()) if whole else (rounded(dy_NF, 0, E4M3).t(), rounded(x_NK, 0, E4M3))


def found(products: Float8Products | None, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
    """Return y, dx and dW, two matrices and x's shape flattened, in float64 on the CPU."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = F.linear(x, w) if products is None else products.linear(x, w)
    y.backward(dy)
    assert x.grad is not None and w.grad is not None and y.dtype == x.grad.dtype == w.grad.dtype == x.dtype
    return [part.detach().double().cpu() for part in (y.flatten(0, 1), x.grad.flatten(0, 1), w.grad)]


def test_the_choices_are_torchaos_recipes() -> None:
    from torchao.float8 import Float8LinearRecipeName

    assert CHOICES["fp8"] == ("none", *(name.value for name in Float8LinearRecipeName)) == ("none", *RECIPES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_product_is_that_of_rounded_operands(recipe: str, device: str) -> None:
    """What is left is the result's rounding to bf16, 2^-9 of it, and the sum's: a GPU's units keep 13 bits and more."""
    products, parts = Float8Products(recipe), operands(device)
    wanted = expected_operands(recipe, *(part.cpu().flatten(0, -2) for part in parts))
    for value, (a, b) in zip(found(products, *parts), wanted, strict=True):
        bound = 2.0**-8 * (a @ b).abs() + (2.0**-22 if device == "cpu" else 2.0**-12) * (a.abs() @ b.abs())
        assert ((value - a @ b).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_program_has_the_same_products(recipe: str, device: str) -> None:
    products, parts = Float8Products(recipe), operands(device)
    products.check(torch.device(device))
    wanted = found(products, *parts)
    backend = "inductor" if device == "cuda" else "aot_eager_decomp_partition"  # whose C++ for a CPU has faults
    program = torch.compile(products.linear, fullgraph=True, dynamic=False, backend=backend)
    products.linear = program  # type: ignore[method-assign]
    for value, eager in zip(found(products, *parts), wanted, strict=True):
        assert torch.equal(value, eager) if device == "cpu" else (value - eager).norm() <= 0.005 * eager.norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_are_those_of_eight_bits_and_not_of_sixteen(recipe: str) -> None:
    """A number of `digits` is rounded by 2^-(digits + 1) of it, or by half the smallest step of its scale.

    The scale is above half of what would make the largest number (of those that share it) the format's largest.
    """
    x, w, dy = operands()
    x_NK, w_FK, dy_NF = (part.double().flatten(0, -2) for part in (x, w, dy))
    gradients = E5M2 if recipe == "tensorwise" else E4M3
    exact = (
        (x_NK, w_FK.t(), E4M3, E4M3),
        (dy_NF, w_FK, gradients, E4M3),
        (dy_NF.t(), x_NK, gradients, E4M3),
    )
    values, plain = found(Float8Products(recipe), x, w, dy), found(None, x, w, dy)
    for index, (value, sixteen, (a, b, of_a, of_b)) in enumerate(zip(values, plain, exact, strict=True)):
        off_a, off_b = (
            2.0 ** -(digits + 1) * m.abs() + 2.0 ** (least - digits - 1) * m.abs().max() / (largest / 2.0)
            for m, (digits, least, largest) in ((a, of_a), (b, of_b))
        )
        sums = off_a @ b.abs() + a.abs() @ off_b + off_a @ off_b
        assert ((value - a @ b).abs() <= sums + 2.0**-8 * (a @ b).abs() + 2.0**-8 * sums).all()
        apart = [float((each - a @ b).norm() / (a @ b).norm()) for each in (value, sixteen)]
        assert apart[1] < 0.003, "bf16"
        if recipe == "rowwise_with_gw_hp" and index == 2:
            assert torch.equal(value, sixteen)
        else:
            assert apart[0] > 5.0 * apart[1]


def test_a_scale_changes_no_digit_but_of_the_smallest() -> None:
    """The numbers of half a matrix are rounded as in the whole, where the largest is 50 times as large.

    Both ways a number below 2^-6, scaled, is rounded by 2^-10 at most, of which the largest is above 2^7.
    """
    x, w, _ = (part.float() for part in operands())
    half = w[: FEATURES // 2].clamp(-3.0, 3.0)
    whole = torch.cat((half, torch.full_like(half, 150.0)))
    bound = 2.0**-16 * 150.0 * (1.0 + 2.0**-4) * x.abs().sum(dim=-1, keepdim=True)

    def differ(products: Float8Products) -> Tensor:
        return (products.output(x, whole)[..., : FEATURES // 2] - products.output(x, half)).abs()

    for recipe in RECIPES:
        assert (differ(Float8Products(recipe, emulate=True)) <= bound).all()
    unlike = Float8Products("tensorwise", emulate=True)
    unlike.config = replace(unlike.config, round_scales_to_power_of_2=False)
    assert (differ(unlike) > 5.0 * bound).any()


def test_frozen_weights_and_data_have_no_gradients_and_errors_stay_seen() -> None:
    x, w, dy = operands()
    products = Float8Products("rowwise")
    leaf = x.clone().requires_grad_()
    products.linear(leaf, w, torch.ones(FEATURES, dtype=torch.bfloat16)).backward(dy)
    assert leaf.grad is not None and torch.equal(leaf.grad, products.input_gradient(dy, w))
    weight = w.clone().requires_grad_()
    products.linear(x, weight).backward(dy)
    assert weight.grad is not None and torch.equal(weight.grad, products.weight_gradient(dy, x))
    for recipe in RECIPES:
        for wrong in (torch.inf, torch.nan):
            x[0, 0, 0] = wrong
            assert not Float8Products(recipe).output(x, w)[0, 0].isfinite().any(), "a step that goes wrong is noticed"


def test_gradients_that_are_put_off_are_the_same_bits() -> None:
    x, w, dy = operands()
    for recipe in RECIPES:
        products, gradients = Float8Products(recipe), WeightGradients()
        leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        bias = torch.ones(FEATURES, dtype=torch.bfloat16, requires_grad=True)
        gradients.linear(leaf, weight, bias, products=products).backward(dy)
        assert weight.grad is None
        pay(gradients.take())
        assert leaf.grad is not None and weight.grad is not None and bias.grad is not None
        wanted = found(products, x, w, dy)
        assert torch.equal(leaf.grad.flatten(0, 1).double(), wanted[1])
        assert torch.equal(weight.grad.double(), wanted[2])
        assert torch.equal(bias.grad, dy.flatten(0, 1).sum(0))


Found = tuple[Tensor, Tensor, dict[str, Tensor]]
FP32 = Initializer(seed=1, dtype=torch.float32, device=torch.device("cpu"))


def check_pair(mesh: ParallelMesh, recipe: str, sequence: bool, powers: bool) -> Found:
    """Return y, dx and this rank's gradients of a column-parallel layer with a row-parallel one behind it, in fp32."""
    group, index = mesh.group("tensor"), mesh.index("tensor")
    share: dict[str, Any] = {"group": group, "init": FP32, "std": 1.0, "bias": True, "sequence": sequence}
    up, down = ColumnParallelLinear("up", K, 64, **share), RowParallelLinear("down", 64, K, **share)
    products = Float8Products(recipe, emulate=True)
    products.config = replace(products.config, round_scales_to_power_of_2=powers)
    for layer in (up, down):
        fill(layer)
        layer.linear = products.linear
    tokens = 32 // group.size() if sequence else 32
    own = slice(index * tokens, index * tokens + tokens) if sequence else slice(None)
    x = random_whole("x", (2, 32, K)).float()[:, own].clone().requires_grad_()
    y = down(torch.tanh(up(x)))
    y.backward(random_whole("dy", (2, 32, K)).float()[:, own])
    assert x.grad is not None
    grads = {name: p.grad for name, p in [*up.named_parameters("up"), *down.named_parameters("down")]}
    return y.detach(), x.grad, {name: grad for name, grad in grads.items() if grad is not None}


def apart(pool: WorkerPool, recipe: str, sequence: bool, powers: bool) -> float:
    """Return how far, relative to its norm, the worst tensor of two tensor ranks is from one process's."""
    (alone,) = pool.run(check_pair, recipe, False, powers, layout=RankLayout())
    ranks: list[Found] = pool.run(check_pair, recipe, sequence, powers, layout=RankLayout(tensor=2))

    def joined(parts: list[Tensor], dim: int | None) -> Tensor:
        return parts[0] if dim is None else torch.cat(parts, dim)

    pairs = [(joined([rank[n] for rank in ranks], 1 if sequence else None), alone[n]) for n in (0, 1)]
    for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1), ("down.bias", None)):
        pairs.append((joined([rank[2][name] for rank in ranks], dim), alone[2][name]))
    return max(float((value - wanted).norm() / wanted.norm()) for value, wanted in pairs)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_ranks_round_as_one_process_does(pool: WorkerPool, recipe: str, sequence: bool) -> None:
    """What differs is the order of sums, in fp32, and how numbers below a 2^13th of the largest are rounded."""
    assert apart(pool, recipe, sequence, powers=True) < 1e-5


def test_scales_that_are_no_powers_of_two_would_part_the_ranks(pool: WorkerPool) -> None:
    assert apart(pool, "tensorwise", False, powers=False) > 0.05


def test_without_torchao_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"train\.fp8=rowwise computes by torchao, .*pip install 'megalm\[fp8\]'"):
        Float8Products("rowwise")


@pytest.mark.parametrize(
    ("recipe", "remedy"), [("tensorwise", "use train.fp8=none"), ("rowwise", "use train.fp8=tensorwise or none")]
)
def test_a_device_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, recipe: str, remedy: str) -> None:
    products = Float8Products(recipe)
    products.check(torch.device("cpu"))

    def missing(*_: Any) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling\nmore")

    monkeypatch.setattr(products, "weight_gradient", missing)
    with pytest.raises(ConfigError) as caught:
        products.check(torch.device("cpu"))
    said = str(caught.value)
    assert said.startswith(f"train.fp8={recipe} is not computed by this cpu device (CUBLAS_STATUS_NOT_SUPPORTED when")
    assert said.endswith(remedy) and "\n" not in said
