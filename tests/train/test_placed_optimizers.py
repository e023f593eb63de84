"""Optimizers that know where their tensors lie, against the libraries' own, and the rounding of a narrow state."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.load import load_recipe
from megalm.config.optim import OptimSection
from megalm.distributed.sharding import ShardSpec
from megalm.distributed.world import check_device
from megalm.errors import ConfigError
from megalm.train.adafactor import mean_shards
from megalm.train.narrow_state import round_stochastically
from megalm.train.optimizers import build_optimizer
from megalm.zero.engine import restore_optimizer
from megalm.zero.parts import Part, own_states, place
from tests.train.test_optimizers import SIMPLE, section

ALONE: Any = SimpleNamespace(size=lambda axis: 1, index=lambda axis: 0, coordinates=SimpleNamespace(tensor=0))
SHAPES = {"a.weight": (6, 10), "b.weight": (2, 4, 6), "b.bias": (24,), "big.weight": (64, 128), "odd.weight": (65, 67)}
STEPS = 20


def start(dtype: torch.dtype = torch.float64) -> list[tuple[ShardSpec, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (ShardSpec.whole(name, shape), (0.1 * torch.randn(shape, generator=generator)).to(dtype))
        for name, shape in SHAPES.items()
    ]


def placed(config: OptimSection, held: list[tuple[ShardSpec, Tensor]], seed: int = 0) -> torch.optim.Optimizer:
    optimizer = build_optimizer(config, held, seed=seed)
    parts = {tensor: [Part(spec, 0, 0, tensor.numel(), True)] for spec, tensor in held}
    place(optimizer, parts, ALONE, divided=False)
    return optimizer


def give_gradients(held: list[tuple[ShardSpec, Tensor]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, (_, tensor) in enumerate(held):
        gradient = torch.randn(tensor.shape, generator=generator) * 10.0 ** (index - 2)
        tensor.grad = gradient.to(tensor.dtype)


def in_groups(held: list[tuple[ShardSpec, Tensor]], decay: float) -> list[dict[str, Any]]:
    return [{"params": [t], "weight_decay": decay if s.name.endswith("weight") else 0.0} for s, t in held]


@pytest.mark.parametrize("lr", [1e-2, 0.5])
def test_twenty_steps_of_adafactor_are_those_of_torchs(lr: float) -> None:
    """A rate of 0.5 is more than step^-1/2 in the later steps; gradients have many scales."""
    ours, theirs = start(), start()
    optimizer = placed(section("adafactor", lr=lr), ours)
    reference = torch.optim.Adafactor(in_groups(theirs, 0.2), lr=lr, eps=(1e-15, 1e-3))  # squared: the paper's 1e-30
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
        for (spec, own), (_, other) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12, msg=f"{spec.name}, step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_forgets_the_scale_of_the_gradients_however_small(dtype: torch.dtype) -> None:
    """Rows a hundred times as large as others too, and a row and a column of zeros; masters may be bf16."""
    moved = {}
    for scale in (1.0, 1e-7):
        weight = torch.zeros(256, 256, dtype=dtype)
        optimizer = placed(section("adafactor", lr=1e-2), [(ShardSpec.whole("a.weight", (256, 256)), weight)])
        gradient = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * scale
        gradient[:128] *= 0.01
        gradient[7], gradient[:, 9] = 0.0, 0.0
        weight.grad = gradient.to(dtype)
        optimizer.step()
        moved[scale] = weight.float()
    assert bool(moved[1.0].isfinite().all()) and not moved[1.0][7].any() and not moved[1.0][:, 9].any()
    near = {"rtol": 1e-3, "atol": 1e-9} if dtype is torch.float32 else {"rtol": 0.05, "atol": 1e-7}
    torch.testing.assert_close(moved[1e-7], moved[1.0], **near)
    lower, upper = moved[1.0][:128].norm(), moved[1.0][128:].norm()
    assert float(lower) == pytest.approx(float(upper), rel=0.05)


def test_adafactor_in_pieces_is_adafactor(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for most in (1 << 22, 70):
        monkeypatch.setattr("megalm.train.adafactor._ELEMENTS", most)
        held = start()
        optimizer = placed(section("adafactor", lr=1e-2), held)
        for step in range(3):
            give_gradients(held, step)
            optimizer.step()
        runs.append(held)
    for (spec, whole), (_, pieces) in zip(*runs, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-14, msg=spec.name)


def test_means_have_their_place_in_the_whole() -> None:
    rows = ShardSpec.split("w", (2, 10, 6), 1, 1, 4)
    assert mean_shards(rows) == {
        "row_var": ShardSpec.split("w", (2, 10), 1, 1, 4),
        "col_var": ShardSpec.whole("w", (2, 6)),
    }
    columns = ShardSpec.split("w", (10, 6), 1, 1, 4)
    assert mean_shards(columns) == {
        "row_var": ShardSpec.whole("w", (10,)),
        "col_var": ShardSpec.split("w", (6,), 0, 1, 4),
    }
    bias = ShardSpec.split("b", (10,), 0, 1, 4)
    assert mean_shards(bias) == {"variance": bias}


def test_twenty_steps_of_eight_bits_are_those_of_torchao() -> None:
    """And near those of AdamW: a coded number is off by a few percent at most."""
    from torchao.optim import AdamW8bit

    ours, theirs, exact = (start(torch.float32) for _ in range(3))
    config = section("adamw8bit", lr=1e-3)
    optimizer, plain = placed(config, ours), placed(section("adamw", lr=1e-3), exact)
    reference = AdamW8bit(in_groups(theirs, 0.2), lr=1e-3, betas=config.betas, eps=config.eps)
    for step in range(STEPS):
        for held in (ours, theirs, exact):
            give_gradients(held, step)
        optimizer.step()
        reference.step()
        plain.step()
    for (spec, own), (_, other), (_, wide) in zip(ours, theirs, exact, strict=True):
        assert torch.equal(own, other), spec.name
        moved = float((wide - start(torch.float32)[[s.name for s, _ in exact].index(spec.name)][1]).norm())
        assert float((own - wide).norm()) < 0.1 * moved, spec.name
    kinds = {(spec.name, kind) for _, spec, kind, _ in own_states(optimizer)}
    assert {kind for name, kind in kinds if name == "big.weight"} == {
        "exp_avg_codes",
        "exp_avg_scales",
        "exp_avg_sq_codes",
        "exp_avg_sq_scales",
    }
    assert {kind for name, kind in kinds if name == "odd.weight"} == {"exp_avg", "exp_avg_sq"}


def test_without_torchao_its_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"adamw8bit is torchao's.*pip install torchao"):
        placed(section("adamw8bit"), start())


def test_apex_is_refused_without_a_gpu_and_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="apex_adamw needs a GPU and this run computes on cpu"):
        check_device(load_recipe("gpt-tiny", ["optim.kind=apex_adamw", "run.device=cpu"]))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ConfigError, match="needs NVIDIA apex built with --cuda_ext"):
        build_optimizer(section("apex_adamw"), [(ShardSpec.whole("a.weight", (2, 2)), on_gpu)])


def test_apex_gets_the_recipes_numbers_and_its_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a class of its signature in its place: the kernel needs a GPU."""

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool) -> None:
            assert adam_w_mode
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "bias_correction": True})

    apex = ModuleType("apex.optimizers")
    apex.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    for name, module in (("amp_C", ModuleType("amp_C")), ("apex", ModuleType("apex")), ("apex.optimizers", apex)):
        monkeypatch.setitem(sys.modules, name, module)
    weight = torch.ones(2, 2)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", lambda self, group: self.param_groups.append(group))
    spec = ShardSpec.whole("a.weight", (2, 2))
    optimizer = build_optimizer(section("apex_adamw", betas=[0.5, 0.6]), [(spec, on_gpu)])
    assert optimizer.defaults["betas"] == (0.5, 0.6) and optimizer.param_groups[0]["weight_decay"] == 0.2
    optimizer.param_groups = [{"params": [weight], "bias_correction": True}]
    restore_optimizer(optimizer, ["exp_avg", "exp_avg_sq"], 7)
    assert optimizer.param_groups[0]["step"] == 7


@pytest.mark.parametrize(
    ("kind", "more"), [("muon", {}), ("adafactor", {}), ("adamw8bit", {}), ("adamw", {"state_dtype": "bf16"})]
)
def test_a_checkpoint_from_before_the_first_update_has_no_state_and_is_gone_on_from(
    kind: str, more: dict[str, Any]
) -> None:
    """fp16 may overflow at the first steps, and a run may be stopped there."""
    plain, restored = start(torch.float32), start(torch.float32)
    for held, is_restored in ((plain, False), (restored, True)):
        optimizer = placed(section(kind, **more), held)
        if is_restored:
            restore_optimizer(optimizer, [], 0)
        for _, tensor in held:
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(plain, restored, strict=True))


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [1.0 + 2.0**-10, -3.3e-5, 1e-39, 123456.7])
def test_the_mean_of_what_is_rounded_is_right_and_each_is_a_neighbour(value: float) -> None:
    count = 200_000
    rounded = round_stochastically(torch.full((count,), value), words(count)).double()
    below, above = sorted({*rounded.tolist()})
    value = float(torch.tensor(value, dtype=torch.float32))
    assert below < value < above
    share = (value - below) / (above - below)
    mean, error = float(rounded.mean()), (above - below) * math.sqrt(share * (1 - share) / count)
    assert abs(mean - value) < 5 * error


def test_numbers_of_bf16_and_what_is_not_finite_stay() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-133, math.inf, -math.inf, math.nan])
    other_nans = torch.tensor([0x7FFFFFFF, -1, -0x00400000], dtype=torch.int32).view(
        torch.float32
    )  # CUDA's is the first
    values = torch.cat((values, other_nans))
    rounded = round_stochastically(values, words(len(values)))
    torch.testing.assert_close(rounded, values.to(torch.bfloat16), rtol=0.0, atol=0.0, equal_nan=True)
    assert math.copysign(1.0, float(rounded[1])) == -1.0


@pytest.mark.parametrize("kind", SIMPLE)
def test_a_narrow_state_is_in_bf16_and_moves_weights_much_as_a_wide_one(kind: str) -> None:
    momentum = {"momentum": 0.9} if kind in ("sgd", "rmsprop") else {}
    runs = {}
    for narrow in (None, "bf16"):
        held = start(torch.float32)
        optimizer = placed(section(kind, lr=1e-3, state_dtype=narrow, **momentum), held)
        for step in range(STEPS):
            give_gradients(held, step)
            optimizer.step()
        runs[narrow] = held
        if narrow:
            states = [value for _, tensor in held for value in optimizer.state[tensor].values() if value.dim()]
            assert states and {value.dtype for value in states} == {torch.bfloat16}
    for (spec, wide), (_, narrow_), (_, first) in zip(runs[None], runs["bf16"], start(torch.float32), strict=True):
        limit = 0.15 if kind == "lion" else 0.02  # of Lion a sign is turned where an average is all but zero
        assert float((narrow_ - wide).norm()) < limit * float((wide - first).norm()), spec.name


def test_an_average_of_squares_grows_by_less_than_bf16_can_tell() -> None:
    """beta2 = 0.999: rounding to the nearest would leave it for ever where a thousandth is less than half a bit."""
    spec, weight = ShardSpec.whole("a.weight", (64, 64)), torch.zeros(64, 64)
    optimizer = placed(section("adamw", lr=1e-6, betas=[0.9, 0.999], state_dtype="bf16"), [(spec, weight)])
    nearest = torch.zeros(64, 64, dtype=torch.bfloat16)
    for _ in range(2000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        nearest = (0.999 * nearest.float() + 0.001).to(torch.bfloat16)
    expected = 1.0 - 0.999**2000
    assert float(optimizer.state[weight]["exp_avg_sq"].float().mean()) == pytest.approx(expected, rel=0.01)
    assert float(nearest.float().mean()) < 0.5 * expected


def test_the_rounding_depends_on_seed_and_step() -> None:
    def state(seed: int, steps: int) -> Tensor:
        held = start(torch.float32)[:1]
        optimizer = placed(section("lion", state_dtype="bf16"), held, seed)
        for _ in range(steps):
            give_gradients(held, 0)
            optimizer.step()
        return optimizer.state[held[0][1]]["exp_avg"]

    assert torch.equal(state(1, 2), state(1, 2)) and not torch.equal(state(1, 2), state(2, 2))
    gradient = torch.full((6, 10), 1.003)  # of which a first step of Lion keeps a share, the same in each element
    held = [(ShardSpec.whole("a.weight", (6, 10)), torch.zeros(6, 10))]
    optimizer, found = placed(section("lion", state_dtype="bf16", betas=[0.9, 0.5]), held), []
    for _ in range(2):
        held[0][1].grad = gradient
        optimizer.step()
        found.append(optimizer.state[held[0][1]].pop("exp_avg"))
    assert not torch.equal(*found)
