"""Gradients of weights that are put off are those of one backward pass, and cost no second one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.pipeline_parallel.weight_gradients import WeightGradients, pay
from tests.shards import assert_close


def parameters(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, 6), (8,), (6, 8))
    return tuple(nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes)  # type: ignore[return-value]


def layers(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, linear: object) -> Tensor:
    """Two products, the first by a view of its weight."""
    assert callable(linear)
    hidden: Tensor = torch.tanh(linear(x, up.flatten(0, 1), bias))
    result: Tensor = linear(hidden, down)
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits_as_those_of_one_backward(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for later in (False, True):
        weights, leaf, gradients = parameters(dtype), x.clone().requires_grad_(), WeightGradients()
        for _ in range(2):  # the second adds to the first
            y = layers(leaf, *weights, linear=gradients.linear if later else F.linear)
            y.square().sum().backward()
            owed = gradients.take()
            assert len(owed) == (2 if later else 0) and not gradients.take()
            pay(owed)
            assert not owed
        found.append([leaf.grad, *(weight.grad for weight in weights)])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_layer_whose_tokens_go_through_in_chunks_pays_once_and_their_sum() -> None:
    x = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for sizes in ([12], [5, 5, 2]):
        up, bias, down = parameters()
        seen: list[str] = []
        for name, weight in (("up", up), ("bias", bias), ("down", down)):
            weight.register_post_accumulate_grad_hook(lambda _, name=name, seen=seen: seen.append(name))
        gradients, flat = WeightGradients(), up.flatten(0, 1)
        hidden = [torch.tanh(gradients.linear(part, flat, bias)) for part in x.clone().requires_grad_().split(sizes)]
        y = torch.cat([gradients.linear(part, down) for part in hidden])
        y.square().sum().backward()
        owed = gradients.take()
        assert [len(one.pieces) for one in owed] == [len(sizes)] * 2
        pay(owed)
        assert sorted(seen) == ["bias", "down", "up"]
        found.append([weight.grad for weight in (up, bias, down)])
    for whole, summed in zip(*found, strict=True):
        assert whole is not None and summed is not None
        assert_close(summed, whole)


def test_weights_have_no_gradient_before_it_is_paid_and_hooks_see_it_then() -> None:
    up, bias, down = parameters()
    seen: list[str] = []
    for name, weight in (("up", up), ("bias", bias), ("down", down)):
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    gradients = WeightGradients()
    leaf = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    layers(leaf, up, bias, down, gradients.linear).sum().backward()
    assert leaf.grad is not None and up.grad is bias.grad is down.grad is None and seen == []
    pay(gradients.take())
    assert seen == ["down", "up", "bias"]


def test_what_needs_no_gradient_is_left_as_it_is() -> None:
    up, bias, down = parameters()
    gradients = WeightGradients()
    data = torch.ones(2, 6, dtype=torch.float64)
    layers(data, up, bias, down, gradients.linear).sum().backward()
    owed = gradients.take()
    assert up.grad is not None and len(owed) == 1  # nobody waits for the data's gradient
    pay(owed)
    with torch.no_grad():
        assert torch.equal(gradients.linear(data, up.flatten(0, 1), bias), F.linear(data, up.flatten(0, 1), bias))
    up.requires_grad_(False)
    layers(data.requires_grad_(), up, bias, down.requires_grad_(False), gradients.linear).sum().backward()
    owed = gradients.take()
    assert [(one.weight is None, one.bias is None) for one in owed] == [(True, False)]
    assert not gradients.take()


def test_the_graph_is_gone_after_the_first_half() -> None:
    """What is kept is each layer's input and the gradient of its output: not what lies between the layers."""
    up, bias, down = parameters()
    gradients = WeightGradients()
    leaf = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    between = gradients.linear(leaf, up.flatten(0, 1), bias)
    squared = between * between  # keeps `between` for its backward
    gone = weakref.ref(between)
    y = gradients.linear(squared, down)
    del between, squared
    y.sum().backward()
    del y
    gc.collect()
    assert gone() is None
    pay(gradients.take())
    assert up.grad is not None and down.grad is not None


def test_recomputed_layers_are_recomputed_once() -> None:
    calls = []
    up, bias, down = parameters()
    gradients = WeightGradients()

    def block(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return layers(x, up, bias, down, gradients.linear)

    leaf = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    y = checkpoint(block, leaf, use_reentrant=False, preserve_rng_state=False)
    y.square().sum().backward()
    assert len(calls) == 2
    pay(gradients.take())
    assert len(calls) == 2
    expected = torch.autograd.grad(layers(leaf, up, bias, down, F.linear).square().sum(), (up, bias, down))
    assert all(
        weight.grad is not None and torch.equal(weight.grad, wanted)
        for weight, wanted in zip((up, bias, down), expected, strict=True)
    )
