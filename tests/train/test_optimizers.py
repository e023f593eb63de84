"""Which tensors decay, and that the recipe's numbers reach torch's optimizers."""

from __future__ import annotations

import pytest
import torch

from megalm.config.optim import OptimSection
from megalm.distributed.sharding import ShardSpec
from megalm.errors import ConfigError
from megalm.train.optimizers import OPTIMIZERS, build_optimizer, is_decayed, treatment

DECAYED = {
    "embedding.weight": (67, 8), "position.weight": (16, 8), "head.weight": (67, 8),
    "blocks.0.attention.qkv.weight": (24, 8), "blocks.0.mlp.up.weight": (2, 16, 8),
}  # fmt: skip
NOT_DECAYED = {
    "final_norm.weight": (8,), "final_norm.bias": (8,), "blocks.0.attention.qkv.bias": (24,),
    "blocks.0.mlp.up.bias": (2, 16),
}  # fmt: skip


def tensors() -> list[tuple[ShardSpec, torch.Tensor]]:
    specs = [ShardSpec.whole(name, shape) for name, shape in {**DECAYED, **NOT_DECAYED}.items()]
    return [(spec, torch.ones(spec.global_shape)) for spec in specs]


def section(kind: str, **values: object) -> OptimSection:
    return OptimSection.model_validate({"kind": kind, "lr": 0.5, "weight_decay": 0.2, **values})


DECOUPLED = ("adamw", "fused_adamw", "lion", "sgd")
COUPLED = ("adam", "rmsprop", "adagrad")
SIMPLE = (*DECOUPLED, *COUPLED)  # those that know nothing of a tensor but its numbers


@pytest.mark.parametrize("kind", DECOUPLED)
def test_decay_shrinks_matrices_and_embeddings_and_leaves_norms_and_biases(kind: str) -> None:
    held = tensors()
    optimizer = build_optimizer(section(kind), held)
    for _, tensor in held:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for spec, tensor in held:
        shrunk = 1.0 - 0.5 * 0.2 if spec.name in DECAYED else 1.0
        torch.testing.assert_close(tensor, torch.full_like(tensor, shrunk))
        assert is_decayed(spec) == (spec.name in DECAYED)


def test_decay_depends_on_the_whole_tensor_not_on_the_part_or_its_flattening() -> None:
    spec = ShardSpec.split("blocks.0.mlp.up.weight", (16, 8), 0, 1, 4)
    flat = torch.ones(32)
    assert build_optimizer(section("sgd"), [(spec, flat)]).param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("kind", COUPLED)
def test_decay_in_the_gradient_shrinks_the_same_tensors(kind: str) -> None:
    held = tensors()
    optimizer = build_optimizer(section(kind, lr=0.01), held)
    for _, tensor in held:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for spec, tensor in held:
        assert bool((tensor < 1.0).all()) == (spec.name in DECAYED) and bool((tensor == 1.0).all()) != (
            spec.name in DECAYED
        )


def test_the_first_rule_that_matches_a_name_counts() -> None:
    rules = [
        {"match": "*.bias", "lr": 0.5},
        {"match": "blocks.0.*", "weight_decay": 0.0},
        {"match": "embedding.weight", "lr": 0.0},
        {"match": "*", "lr": 9.0},
    ]
    config = section("adamw", rules=rules)
    found = {spec.name: treatment(config, spec)[:2] for spec, _ in tensors()}
    assert found["blocks.0.attention.qkv.bias"] == found["final_norm.bias"] == (0.0, 0.5)
    assert found["blocks.0.mlp.up.weight"] == (0.0, 1.0)
    assert found["embedding.weight"] == (0.2, 0.0)
    assert found["head.weight"] == (0.2, 9.0) and found["final_norm.weight"] == (0.0, 9.0)
    groups = build_optimizer(config, tensors()).param_groups
    assert {(group["weight_decay"], group["lr_scale"]) for group in groups} == set(found.values())


def test_each_kind_is_held_to_a_reference() -> None:
    assert {*SIMPLE, "adafactor", "adamw8bit", "apex_adamw", "muon"} == set(
        OPTIMIZERS.names()
    )  # see the tests beside this


@pytest.mark.parametrize("kind", SIMPLE)
def test_twenty_steps_are_those_of_a_plain_implementation(kind: str) -> None:
    """Written out, one number at a time, from the papers."""
    config = section(kind, lr=0.05, eps=1e-3, betas=[0.8, 0.9], momentum=0.5 if kind in ("sgd", "rmsprop") else 0.0)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    optimizer = build_optimizer(config, [(ShardSpec.whole("a.weight", (5, 2)), weight)])
    expected = [Plain(kind, config, value) for value in weight.flatten().tolist()]
    for _ in range(20):
        weight.grad = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        for plain, gradient in zip(expected, weight.grad.flatten().tolist(), strict=True):
            plain.step(gradient)
        optimizer.step()
    assert weight.flatten().tolist() == pytest.approx([plain.w for plain in expected], rel=1e-6)


class Plain:
    """One weight and its optimizer."""

    def __init__(self, kind: str, config: OptimSection, w: float) -> None:
        self.kind, self.config, self.w = kind, config, w
        self.m = self.v = 0.0
        self.steps = 0

    def step(self, g: float) -> None:
        c, (b1, b2) = self.config, self.config.betas
        lr, decay, eps = c.lr, c.weight_decay, c.eps
        self.steps += 1
        if self.kind in ("adam", "sgd", "rmsprop", "adagrad"):
            g += decay * self.w
        if self.kind in ("adamw", "fused_adamw", "adam"):
            self.w *= 1.0 if self.kind == "adam" else 1.0 - lr * decay
            self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
            corrected = (self.v / (1 - b2**self.steps)) ** 0.5
            self.w -= lr * self.m / (1 - b1**self.steps) / (corrected + eps)
        elif self.kind == "lion":
            direction = b1 * self.m + (1 - b1) * g
            self.w -= lr * ((direction > 0) - (direction < 0) + decay * self.w)
            self.m = b2 * self.m + (1 - b2) * g
        elif self.kind == "sgd":
            self.m = c.momentum * self.m + g
            self.w -= lr * self.m
        elif self.kind == "rmsprop":
            self.v = c.alpha * self.v + (1 - c.alpha) * g * g
            self.m = c.momentum * self.m + g / (self.v**0.5 + eps)
            self.w -= lr * self.m
        else:
            self.v += g * g
            self.w -= lr * g / (self.v**0.5 + eps)


def test_every_tensor_is_in_one_group_and_no_group_is_empty() -> None:
    held = tensors()
    groups = build_optimizer(section("adamw"), held).param_groups
    assert sorted(id(t) for group in groups for t in group["params"]) == sorted(id(t) for _, t in held)
    norms = [(spec, tensor) for spec, tensor in held if spec.name in NOT_DECAYED]
    assert [group["weight_decay"] for group in build_optimizer(section("adamw"), norms).param_groups] == [0.0]


def test_adamw_takes_rate_betas_and_eps_and_its_step_is_the_papers() -> None:
    weight = torch.ones(2, 3, dtype=torch.float64)
    optimizer = build_optimizer(
        section("adamw", betas=[0.8, 0.9], eps=0.01), [(ShardSpec.whole("a.weight", (2, 3)), weight)]
    )
    first = second = torch.zeros_like(weight)
    expected = weight.clone()
    for step, size in enumerate((1.0, -3.0), start=1):
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * size, 0.9 * second + 0.1 * size**2
        expected *= 1.0 - 0.5 * 0.2
        expected -= 0.5 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 0.01)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0.0)


def test_sgd_takes_its_momentum() -> None:
    weight = torch.ones(3)
    optimizer = build_optimizer(section("sgd", momentum=0.5), [(ShardSpec.whole("a.bias", (3,)), weight)])
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(weight, torch.full((3,), 1.0 - 0.5 - 0.5 * 1.5))


def test_an_unknown_kind_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="did you mean adam"):
        OPTIMIZERS.get("adamv")


def test_our_adamw_makes_the_steps_of_torchs() -> None:
    runs = []
    for kind in ("adamw", "fused_adamw"):
        generator = torch.Generator().manual_seed(3)
        held = [(spec, torch.randn(spec.global_shape, generator=generator).double()) for spec, _ in tensors()]
        optimizer = build_optimizer(section(kind, lr=0.01), held)
        for _ in range(5):
            for _, tensor in held:
                tensor.grad = torch.randn(tensor.shape, generator=generator).double()
            optimizer.step()
        runs.append([tensor for _, tensor in held])
        assert {"step", "exp_avg", "exp_avg_sq"} == optimizer.state[held[0][1]].keys()
    for ours, plain in zip(*runs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)
