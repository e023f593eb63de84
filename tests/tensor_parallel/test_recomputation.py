"""Inputs that are made again: when they are there, how often they are made, and of what."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.attention import Attention
from megalm.nn.context import Context
from megalm.tensor_parallel import linear
from megalm.tensor_parallel.recomputation import made_again, remember, unchanged
from tests.nn.layers import INIT, model_section
from tests.shards import fill, random_whole
from tests.worker_pool import WorkerPool


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


class Counted:
    """An expensive function, and what it has made."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[object]] = []

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.stack((x.sin(), x.cos()), dim=-1).flatten(-2)
        self.made.append(weakref.ref(y.untyped_storage()))
        return y

    def there(self) -> list[bool]:
        return [storage() is not None for storage in self.made]


def products(function: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor], again: bool) -> Tensor:
    y = function(x)
    y, origin = remember(y, x, function) if again else (y, None)
    first, second = y.split(y.shape[-1] // 2, dim=-1)
    with made_again(y, origin):
        return F.linear(first, weights[0]).sum() + (F.linear(second, weights[1]) * 3.0).sum()


def test_an_input_is_gone_between_the_passes_and_made_once_for_all_its_products() -> None:
    x, weights = leaf(2, 3, 4), [leaf(5, 4), leaf(6, 4)]
    function = Counted()
    loss = products(function, x, weights, again=True)
    assert function.there() == [False]
    there_at_the_first: list[bool] = []
    weights[1].register_hook(lambda _: there_at_the_first.extend(function.there()))
    loss.backward()
    assert there_at_the_first == [False, True], "it waits for the other product"
    assert function.there() == [False, False]
    ours = [tensor.grad for tensor in (x, *weights)]
    for tensor in (x, *weights):
        tensor.grad = None
    products(Counted(), x, weights, again=False).backward()
    for found, tensor in zip(ours, (x, *weights), strict=True):
        assert found is not None and tensor.grad is not None and torch.equal(found, tensor.grad)


def test_a_graph_that_is_kept_makes_it_again_each_time() -> None:
    x, weights, function = leaf(2, 3, 4), [leaf(5, 4), leaf(6, 4)], Counted()
    loss = products(function, x, weights, again=True)
    loss.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in weights if tensor.grad is not None]
    loss.backward()
    assert all(torch.equal(weight.grad, 2.0 * grad) for weight, grad in zip(weights, once, strict=True))  # type: ignore[arg-type]
    assert not any(function.there())


def test_weights_and_their_views_stay_as_they_are() -> None:
    x, weight = leaf(2, 3, 4), leaf(2, 5, 4)
    y, origin = remember(x * 2.0, x, lambda source: source * 2.0)
    with made_again(y, origin):
        result = F.linear(y, weight.flatten(0, 1))
    with torch.no_grad():
        weight.mul_(2.0)  # seen by the backward pass, as a weight that arrives late is
    result.sum().backward()
    for tensor, other in ((x, weight), (weight, x)):
        torch.testing.assert_close(tensor.grad, 2.0 * other.detach().sum((0, 1)).expand_as(tensor))


def test_without_gradients_there_is_no_origin_and_what_is_made_otherwise_is_refused() -> None:
    assert remember(torch.ones(2), torch.ones(2), unchanged)[1] is None
    x, weight = leaf(2, 4), leaf(3, 4)
    y, origin = remember(x * 2.0, x, lambda source: source[:1] * 2.0)
    with made_again(y, origin):
        result = F.linear(y, weight).sum()
    with pytest.raises(AssertionError, match="an input of 64 bytes is made again with 32"):
        result.backward()


def count_gathers(mesh: ParallelMesh, models: dict[str, int]) -> list[int]:
    """Return how many gathers the forward and the backward pass of an attention take."""
    config = model_section(**models)
    layer = Attention("blocks.0.attention", 0, config, group=mesh.group("tensor"), init=INIT, sequence=True)
    fill(layer)
    x = random_whole("x", (1, 4, config.hidden)).requires_grad_()
    counts = []
    gather = linear.gather_sequence
    with mock.patch.object(linear, "gather_sequence", side_effect=gather) as gathered:
        y, origin = remember(x * 1.0, x, lambda source: source * 1.0)
        result = layer(y, Context(8), origin)
        counts.append(gathered.call_count)
        result.sum().backward()
        counts.append(gathered.call_count - counts[0])
    return counts


@pytest.mark.parametrize("models", [{}, {"kv_heads": 1}], ids=str)
def test_two_products_gather_once(pool: WorkerPool, models: dict[str, int]) -> None:
    assert pool.run(count_gathers, models, layout=RankLayout(tensor=2)) == [[1, 1], [1, 1]]
