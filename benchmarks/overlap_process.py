"""One rank of the overlap benchmark: `python overlap_process.py JOB.json`, started by `overlap.py`.

Rank 0 writes what was measured beside the job.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from workers import result_of

from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.data.loader import Batch
from megalm.distributed.communication_time import CommunicationClock
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.world import joined_mesh
from megalm.models.build import build_executor, build_stage
from megalm.tensor_parallel.linear import Linear
from megalm.train.optimizers import build_optimizer
from megalm.train.trainer import Trainer, TrainState
from megalm.zero.build import build_engine

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative, after all steps: the two sides round otherwise."""


class RandomText:
    """Random tokens, functions of the step's first sample; the loader's interface."""

    def __init__(self, config: RunConfig, mesh: ParallelMesh) -> None:
        assert config.model.vocab is not None
        self.vocab, self.sequence, self.rank = config.model.vocab, config.model.sequence, mesh.coordinates.data

    def batch(self, first_sample: int, global_batch: int, rows: int) -> Batch:
        """Return this data rank's rows."""
        generator = torch.Generator().manual_seed(first_sample + self.rank)
        tokens = torch.randint(self.vocab, (rows, self.sequence + 1), generator=generator)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, self.sequence, dtype=torch.bool))


def recipe(settings: dict[str, Any]) -> RunConfig:
    """Return a recipe with these keys."""
    keys = {"train.steps": 10**6, **settings}
    return load_recipe("gpt-tiny", [f"{key}={json.dumps(value)}" for key, value in keys.items()])


def build_trainer(config: RunConfig, mesh: ParallelMesh, clock: CommunicationClock) -> Trainer:
    """Return the trainer that `megalm train` would build, over random text."""
    assert config.model.vocab is not None
    model = build_stage(config, config.model.vocab, mesh, document_start=0)
    make_optimizer = partial(build_optimizer, config.optim, width_factor=config.model.width_factor, seed=config.seed)
    engine = build_engine(config, model, mesh, make_optimizer, model.tied_weight)
    executor, text = build_executor(config, engine.module, mesh), RandomText(config, mesh)
    return Trainer(config, mesh, executor, engine, text, TrainState(), clock)  # type: ignore[arg-type]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2.0 * ctx.seconds)
        return gradient, None


class Late:
    """A collective's handle, whose result is there at a time of its own at the soonest."""

    def __init__(self, work: dist.Work, there_at: float, links: Links) -> None:
        self.work, self.there_at, self.links = work, there_at, links

    def wait(self) -> None:
        """Wait for the collective and for its time."""
        self.links.stand(self.work.wait, self.there_at)


class Links:
    """Processors and links that are slept for: neither needs a core, so they go side by side as a GPU and its network.

    A product of a block's linear layer takes its floating-point operations at `flops_per_s`, besides what it takes. A
    collective is through no sooner than a link of `bytes_per_s` has sent a ring's share of it, those of a group one
    after the other. `waited_s` is what this rank stood.
    """

    SHARES: ClassVar = {"all_reduce": 2.0, "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0}

    def __init__(self, flops_per_s: float, bytes_per_s: float) -> None:
        self.flops_per_s, self.bytes_per_s = flops_per_s, bytes_per_s
        self.waited_s = 0.0
        self._free_at: dict[str, float] = {}
        for name in self.SHARES:
            setattr(dist, name, self._delayed(name, getattr(dist, name)))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b, late."""
        y: Tensor = _Product.apply(F.linear(x, weight, bias), 2.0 * x.numel() * len(weight) / self.flops_per_s)
        return y

    def stand(self, wait: Callable[[], Any], there_at: float) -> None:
        """Wait, and on until a time."""
        begin = time.perf_counter()
        wait()
        time.sleep(max(0.0, there_at - time.perf_counter()))
        self.waited_s += time.perf_counter() - begin

    def _delayed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, group: Any = None, async_op: bool = False, **options: Any) -> Any:
            size = dist.get_world_size(group)
            whole = max(tensor.nbytes for tensor in arguments if isinstance(tensor, Tensor))
            key = dist.group.WORLD.group_name if group is None else group.group_name
            begin = max(time.perf_counter(), self._free_at.get(key, 0.0))
            self._free_at[key] = begin + self.SHARES[name] * whole * (size - 1) / size / self.bytes_per_s
            late = Late(original(*arguments, group=group, async_op=True, **options), self._free_at[key], self)
            return late if async_op else late.wait()

        return call


def step(trainer: Trainer, links: Links | None) -> tuple[float, float, float]:
    """Return a step's seconds, of the slowest rank, the mean share of it that ranks wait, and its loss."""
    cuda = trainer.mesh.device.type == "cuda"
    dist.barrier()
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = trainer.train_step()
    if cuda:
        torch.cuda.synchronize()
    own_s, waited_s = time.perf_counter() - begin, result.times.communication_s
    if links is not None:
        waited_s, links.waited_s = links.waited_s, 0.0
    own = torch.tensor([own_s, waited_s / own_s], dtype=torch.float64, device=trainer.mesh.device)
    seen = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(seen, own)
    seconds, shares = torch.stack(seen).unbind(dim=1)
    return seconds.max().item(), shares.mean().item(), result.loss


def work(job_path: Path) -> None:
    """Do the job described in a file, and write rank 0's result beside it."""
    job = json.loads(job_path.read_text())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    configs = {side: recipe({**job["settings"], **job[side]}) for side in ("on", "off")}
    measured: dict[str, list[Any]] = {"on": [], "off": []}
    with joined_mesh(configs["on"]) as mesh, CommunicationClock(mesh.device) as clock:
        trainers = {side: build_trainer(config, mesh, clock) for side, config in configs.items()}
        links = Links(**job["links"]) if job["links"] else None
        for trainer in trainers.values() if links is not None else ():
            for layer in trainer.engine.module.modules():
                if isinstance(layer, Linear):
                    layer.linear = links.linear
        losses = {}
        for number in range(job["warm"] + job["pairs"]):
            for side in ("on", "off") if number % 2 else ("off", "on"):
                seconds, waiting, losses[side] = step(trainers[side], links)
                if number >= job["warm"]:
                    measured[side].append([seconds, waiting])
        difference = abs(losses["on"] / losses["off"] - 1.0)
        assert difference <= LOSS_TOLERANCE[configs["on"].precision], f"losses differ: {losses}"
        if mesh.rank == 0:
            result_of(job_path).write_text(json.dumps({**measured, "loss_difference": difference}))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
