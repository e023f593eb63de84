"""What stands for an engine in a dry run: what becomes of gradients, as far as it takes memory or sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.dry_run.recording import Call
from megalm.dry_run.stated import Stated
from megalm.models.build import DTYPES, build_stage
from megalm.models.transformer import Transformer
from megalm.train.optimizers import freeze, grouped
from megalm.zero.engine import chunks_of, replicas_of, shard_of


class Engine(Protocol):
    """Stands where a ZeroEngine does."""

    module: Transformer
    """What is computed with."""

    def held(self) -> list[Tensor]:
        """Return the tensors that are no activations."""

    def buffers(self) -> int:
        """Return the bytes of the buckets among them."""

    def take_calls(self) -> list[Call]:
        """Return what is stated to be sent for the gradients that came since the last call of this."""

    def microbatch_done(self) -> None:
        """Take in the gradients of one microbatch's backward pass."""

    def weights_updated(self) -> None:
        """Send what is sent at the end of an update and is not stated."""


@contextmanager
def pretended_engine(
    config: RunConfig, model: Transformer, mesh: ParallelMesh, stated: Stated, vocab: int, microbatches: int
) -> Iterator[Engine]:
    """Give what stands for the engine of the recipe's ZeRO stage; under stage 3 it has a model of its own."""
    if config.zero.stage < 3:
        yield _Gradients(model, stated, microbatches)
        return
    from megalm.zero.deepspeed_shapes import deepspeed_on_meta

    with deepspeed_on_meta():
        yield _Stage3(config, mesh, vocab)


class _Gradients:
    """Stages 0 to 2, whose messages are stated; of DeepSpeed's engine only what takes memory."""

    def __init__(self, model: Transformer, stated: Stated, microbatches: int) -> None:
        self.module, self.stated = model, stated
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._early = stated.early_buckets()
        self._left: dict[Tensor, int] = {one: microbatches * chunks_of(one) for one in self._trained}
        self._travelling: list[Tensor] = []
        self._arrived: list[Tensor] = []
        self._filled: Counter[Axis] = Counter()
        stage, narrow = stated.stage, DTYPES[stated.config.precision] is not stated.wide
        self._waits = stage == 0 and narrow
        for parameter in self._trained:
            if stage < 2 and not narrow:  # sums are kept in the parameters' own gradients
                parameter.grad = torch.zeros_like(parameter)
            elif stage > 0:
                parameter.register_post_accumulate_grad_hook(self._take)
            if stage == 2:
                parameter.register_post_accumulate_grad_hook(self._arrived.append)
            if self._early:
                parameter.register_post_accumulate_grad_hook(self._count)

    def held(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return [*self.module.parameters(), *gradients]

    def buffers(self) -> int:
        return self.stated.buffers()

    def take_calls(self) -> list[Call]:
        calls = self.stated.microbatch(self._arrived)
        self._arrived.clear()
        return calls

    def microbatch_done(self) -> None:
        self._flush()
        for parameter in self._trained if self._waits else ():
            parameter.grad = None

    def weights_updated(self) -> None:
        """Send nothing."""

    def _count(self, parameter: Tensor) -> None:
        """Drop a final gradient of 16 bits; copy a bucket whose are all final to the format that travels, if another.

        The end of the step drops the copies.
        """
        self._left[parameter] -= 1
        if self._waits and self._left[parameter] == 0:
            parameter.grad = None
        while self._early and not any(self._left[one] for one in self._early[0]):
            size = sum(one.numel() for one in self._early.pop(0))
            if self.stated.travelling is not self.stated.wide:
                self._travelling.append(torch.empty(size, dtype=self.stated.travelling, device="meta"))

    def _take(self, parameter: Tensor) -> None:
        """Add a gradient to its sum, which takes a wide copy of it, or under stage 2 to the bucket."""
        assert parameter.grad is not None
        if self.stated.stage != 2:
            parameter.grad.to(self.stated.wide)
        else:
            if self._filled.total() + parameter.numel() > self.stated.bucket:
                self._flush()
            self._filled[replicas_of(shard_of(parameter))] += parameter.numel()
        parameter.grad = None

    def _flush(self) -> None:
        """Reduce the bucket: DeepSpeed makes a tensor for each group of ranks, then what travels of it."""
        for size in self._filled.values():
            dtype = DTYPES[self.stated.config.precision]
            torch.empty(size, dtype=dtype, device="meta").to(self.stated.travelling)
        self._filled.clear()


class _Stage3:
    """DeepSpeed's own engine on shapes; its optimizer, which makes no update, is any."""

    def __init__(self, config: RunConfig, mesh: ParallelMesh, vocab: int) -> None:
        from megalm.zero.deepspeed_shapes import ShapesOfStage3

        self._engine = ShapesOfStage3(config, mesh)
        model = build_stage(config, vocab, mesh, self._engine.divide, document_start=0)
        freeze(config.optim, model.parameters())

        def optimizer(tensors: Sequence[tuple[ShardSpec, Tensor]]) -> torch.optim.Optimizer:
            groups = grouped(config.optim, tensors, config.model.width_factor)
            return torch.optim.SGD([{"params": members} for _, members in groups], lr=1.0)

        module: nn.Module = self._engine.wrap(model, optimizer)
        assert isinstance(module, Transformer)
        self.module = module
        self.held, self.buffers = self._engine.held, self._engine.buffers
        self.microbatch_done, self.weights_updated = self._engine.microbatch_done, self._engine.weights_updated

    def take_calls(self) -> list[Call]:
        return []
