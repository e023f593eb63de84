"""The optimizer as the trainer sees it: gradients in, reduced and clipped update out, whatever the ZeRO stage.

A step is: `begin(microbatches)`; backward passes, `microbatch_done()` after each; then `reduce()`; then `update(lr)` or
`discard()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.distributed.exchange import together
from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.zero.parts import PlacedOptimizer

MakeOptimizer = Callable[[Sequence[tuple[ShardSpec, Tensor]]], torch.optim.Optimizer]
"""Builds the optimizer over tensors, given with the spec of the logical tensor that each one is a part of."""

ReadFragment = Callable[[ShardSpec, str, int, int, Tensor], object]
"""(shard, kind, start, stop, out): fill `out`, 1-D, with that range of the flattened local tensor; its dtype stays."""


LARGEST_NORM = 1.8e19
"""A larger gradient norm counts as infinite in every stage and precision: fp32 does not hold its square."""


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that this rank holds through a step: what ZeRO divides, and what it does not."""

    weights: int
    master_weights: int
    gradients: int
    optimizer: int


class ZeroEngine(ABC):
    """What every stage offers. All methods that communicate must be called by every rank of the mesh."""

    module: nn.Module
    """What the forward pass must be called on."""

    tied_weight: Tensor | None
    """This stage's copy of a weight that another stage holds too, if it has one."""

    loss_factor: float
    """Multiply the loss by this before the backward pass: it undoes the mean over data ranks, where one is taken."""

    def begin(self, microbatches: int) -> None:  # noqa: B027  # most engines need not know
        """Be told that a step of so many microbatches begins, before its first forward."""

    @abstractmethod
    def microbatch_done(self) -> None:
        """Take in the gradients of one microbatch's backward pass."""

    @abstractmethod
    def reduce(self) -> None:
        """Sum the gradients of the step over data ranks, and those of tied weights over their two stages."""

    @abstractmethod
    def update(self, lr: float) -> float:
        """Clip, update the weights at learning rate `lr`, drop the gradients; return the norm before clipping.

        The norm counts every logical parameter of the whole model once. Where it is not finite, or beyond
        `LARGEST_NORM`, nothing is updated and what is returned is not finite.
        """

    @abstractmethod
    def discard(self) -> None:
        """Drop the reduced gradients of a step that is to make no update, in place of `update`."""

    @abstractmethod
    def gradients(self) -> Iterator[Fragment]:
        """Yield, between `reduce` and `update`, the reduced gradients that this rank holds."""

    @abstractmethod
    def counted_gradients(self) -> Iterator[Fragment]:
        """Yield the part of `gradients` that this rank counts; together the ranks' are whole, each element once."""

    @abstractmethod
    def state(self) -> Iterator[Fragment]:
        """Yield the master weights and the optimizer state that this rank is to save; together the ranks' are whole."""

    @torch.no_grad()
    def load(self, read: ReadFragment, kinds: Sequence[str], steps: int) -> None:
        """Set master weights, the optimizer state of `kinds`, and the weights; `steps` updates have been made.

        Every rank of the world must call; an error of `read` on any is raised on all. What the engine holds is then
        undefined, until another load.
        """
        with together(world_group()):
            self.read_optimizer(read, kinds, steps)
            self.read_weights(read)
        self.spread_weights()

    @torch.no_grad()
    def load_weights(self, read: ReadFragment) -> None:
        """Set master weights and weights from "weight", as `load` does; the optimizer stays as a new run's."""
        with together(world_group()):
            self.read_weights(read)
        self.spread_weights()

    @abstractmethod
    def read_optimizer(self, read: ReadFragment, kinds: Sequence[str], steps: int) -> None:
        """Set this rank's part of the optimizer state of `kinds`."""

    @abstractmethod
    def read_weights(self, read: ReadFragment) -> None:
        """Set this rank's part of the master weights, and of the frozen weights."""

    @abstractmethod
    def masters_and_states(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the master weights that this rank updates, each with its optimizer state."""

    @abstractmethod
    def spread_weights(self) -> None:
        """Set the weights of all ranks from the master weights, rounded to their dtype."""

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the average of the weights, the state "ema", to the weights that `update` has made.

        It starts as the weights that are there when it is first called; saved and loaded as every state is.
        """
        for master, state in self.masters_and_states():
            if "ema" in state:
                state["ema"].lerp_(master, 1.0 - decay)
            else:
                state["ema"] = master.detach().clone()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Compute with the average of the weights, inside. Every rank of the mesh must call."""
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    @torch.no_grad()
    def _exchange_average(self) -> None:
        for master, state in self.masters_and_states():
            weights = master.detach().clone()
            master.copy_(state["ema"])
            state["ema"].copy_(weights)
        self.spread_weights()

    @abstractmethod
    def replicas(self, axis: Axis = "replica") -> Iterator[tuple[str, Tensor]]:
        """Yield, with their names and in the same order, the tensors that the ranks of an axis hold whole and alike.

        "replica": what all data ranks do. "expert_replica": experts, of which only those do that hold the same ones.
        """

    def report(self) -> list[str]:
        """Return what the engine has to say at the end of a run, in lines; this rank's alone."""
        return []

    @abstractmethod
    def held_bytes(self) -> HeldBytes:
        """Return what this rank holds now; gradients are whole between `reduce` and `update`."""


def shard_of(parameter: Tensor) -> ShardSpec:
    """Return the part of a logical tensor that a parameter is."""
    spec: ShardSpec = parameter.shard  # type: ignore[attr-defined]
    return spec


def chunks_of(parameter: Tensor) -> int:
    """Return in how many chunks of its stage a parameter is used: one, if nothing else was said of it."""
    return int(getattr(parameter, "chunks", 1))


def kept_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers of a module that are parts of logical tensors, and so of every checkpoint: routers' biases."""
    return [buffer for buffer in module.buffers() if hasattr(buffer, "shard")]


def replicas_of(shard: ShardSpec) -> Axis:
    """Return the axis whose ranks hold the same part of a logical tensor as this one: fewer do of experts."""
    return "replica" if shard.first_expert is None else "expert_replica"


def counted_here(parameter: Tensor, mesh: ParallelMesh, tied_weight: Tensor | None) -> bool:
    """Return whether this rank counts the parameter: its part is no copy of another model rank's.

    Parameters that every tensor rank holds whole belong to tensor rank 0, tied weights to the first stage.
    """
    if parameter is tied_weight and not mesh.is_first_stage:
        return False
    return shard_of(parameter).dim is not None or mesh.coordinates.tensor == 0


def restore_optimizer(
    optimizer: torch.optim.Optimizer, kinds: Sequence[str], steps: int
) -> dict[Tensor, dict[str, Tensor]]:
    """Give every tensor of the optimizer a zero state of its `kinds`, as after `steps` updates; return it for filling.

    The step counter has the dtype and place that torch's own first update would give it; apex has one for each group.
    """
    counted = {"exp_avg", "square_avg"}  # torch counts the steps of Adam and RMSprop
    # Before an update torch's optimizers have no state at all; those with kinds of their own count from 0.
    keeps_count = isinstance(optimizer, PlacedOptimizer) and (steps > 0 or bool(optimizer.own_kinds))
    narrow = optimizer.state_dtype if isinstance(optimizer, PlacedOptimizer) else None
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable")) and narrow is None
        own = optimizer.kinds_of(group, kinds) if isinstance(optimizer, PlacedOptimizer) else kinds
        if "bias_correction" in group:
            group["step"] = steps
        for tensor in group["params"]:
            state: dict[str, Tensor] = {
                kind: torch.zeros_like(tensor, dtype=None if kind == "ema" else narrow, requires_grad=False)
                for kind in own
            }
            if counted & set(kinds) or keeps_count:
                device = tensor.device if on_device else torch.device("cpu")
                state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)
            optimizer.state[tensor] = state
    return optimizer.state


def tensor_states(state: dict[str, Tensor], numel: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the states that have an element for each of the `numel` elements of a tensor, in order of their names."""
    for kind in sorted(state):
        value = state[kind]
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel:
            yield kind, value


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the distinct storages behind the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() > 0}
    return sum(storages.values())
