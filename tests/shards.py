"""Whole logical tensors and the parts of them that ranks hold, for tests that compare a rank with the whole."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megalm.distributed.sharding import Fragment, ShardSpec

LIMIT = 1e-12
"""Relative L2 difference that float64 and another order of summation may make in tensors of some hundred elements."""


def random_whole(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return float64 normal numbers that depend on the name and the shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def part_of(whole: Tensor, spec: ShardSpec) -> Tensor:
    """Return the local tensor that `spec` cuts from the whole one; padding is zero."""
    assert tuple(whole.shape) == spec.global_shape, f"{spec.name}: {tuple(whole.shape)}, spec {spec.global_shape}"
    if spec.dim is None:
        return whole.clone()
    whole = _of_experts(whole, spec)
    local = whole.new_zeros(spec.local_shape)
    local.narrow(spec.dim, 0, spec.length).copy_(whole.narrow(spec.dim, spec.start, spec.length))
    return local


def _of_experts(whole: Tensor, spec: ShardSpec) -> Tensor:
    """Return the experts that a rank holds of a tensor whose dim 0 counts them, else the tensor."""
    return whole if spec.first_expert is None else whole.narrow(0, spec.first_expert, spec.local_shape[0])


def spec_of(parameter: Tensor) -> ShardSpec:
    """Return the part that a parameter is."""
    spec: ShardSpec = parameter.shard  # type: ignore[attr-defined]
    return spec


def fill(module: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Give every parameter its part of a random whole; return the wholes by name, as leaves that take gradients."""
    wholes: dict[str, Tensor] = {}
    for parameter in module.parameters():
        spec = spec_of(parameter)
        whole = scale * random_whole(spec.name, spec.global_shape)
        parameter.data.copy_(part_of(whole, spec))
        wholes[spec.name] = whole.requires_grad_()
    return wholes


def assert_close(actual: Tensor, expected: Tensor, what: str = "values", limit: float = LIMIT) -> None:
    """Fail unless the two are of one shape and differ by at most `limit` of the expected norm."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference, size = float((actual - expected).detach().norm()), float(expected.detach().norm())
    assert difference <= limit * size, f"{what}: {difference:.3e} apart, norm {size:.3e}"


def assert_gradients_close(module: nn.Module, wholes: dict[str, Tensor], limit: float = LIMIT) -> None:
    """Fail unless every parameter's gradient is its part of the whole tensor's gradient."""
    for parameter in module.parameters():
        spec = spec_of(parameter)
        gradient = wholes[spec.name].grad
        assert parameter.grad is not None and gradient is not None, f"{spec.name} has no gradient"
        size = float(gradient.norm())
        difference = float((parameter.grad - part_of(gradient, spec)).norm())
        assert difference <= limit * size, f"gradient of {spec.name}: {difference:.3e} apart, norm {size:.3e}"


def global_indices(spec: ShardSpec) -> Tensor:
    """Return, for each element of the flattened local tensor, its index in the flattened whole; -1 for padding."""
    whole = torch.arange(math.prod(spec.global_shape)).view(spec.global_shape)
    if spec.dim is None:
        return whole.flatten()
    whole = _of_experts(whole, spec)
    local = torch.full(spec.local_shape, -1)
    local.narrow(spec.dim, 0, spec.length).copy_(whole.narrow(spec.dim, spec.start, spec.length))
    return local.flatten()


class Store:
    """All ranks' fragments put together, as a checkpoint does: {(name, kind): the flat whole tensor}."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self.wholes: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[tuple[str, str], Tensor] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for fragment in fragments:
            spec, values = fragment.shard, fragment.values
            key = (spec.name, fragment.kind)
            assert self.shapes.setdefault(key, spec.global_shape) == spec.global_shape, key
            size = math.prod(spec.global_shape)
            whole = self.wholes.setdefault(
                key, torch.full((size,), math.nan if values.is_floating_point() else 0, dtype=values.dtype)
            )
            count = self.counts.setdefault(key, torch.zeros(size, dtype=torch.int64))
            at = global_indices(spec)[fragment.start : fragment.start + values.numel()]
            assert len(at) == values.numel(), f"{key}: a fragment reaches beyond its tensor"
            whole[at[at >= 0]] = values[at >= 0]
            count[at[at >= 0]] += 1
            assert not values[at < 0].any(), f"{key}: padding is not zero"

    def assert_tiled_once(self) -> None:
        """Fail where an element was given by no rank or by two."""
        for key, count in self.counts.items():
            assert (count == 1).all(), f"{key}: elements are given {sorted(set(count.tolist()))} times"

    def kinds(self) -> set[str]:
        """Return the kinds that were given."""
        return {kind for _, kind in self.wholes}

    def read(self, spec: ShardSpec, kind: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with a range of a flattened local tensor; padding is zero."""
        whole = self.wholes[spec.name, kind]
        at = global_indices(spec)[start:stop]
        out.copy_(torch.where(at >= 0, whole[at.clamp_min(0)], torch.zeros((), dtype=whole.dtype)))

    def assert_same(self, other: Store) -> None:
        """Fail unless the other holds the same tensors, bit for bit."""
        assert self.wholes.keys() == other.wholes.keys()
        for key, whole in self.wholes.items():
            assert torch.equal(whole, other.wholes[key]), f"{key}: {(whole - other.wholes[key]).abs().max():.3e} apart"
