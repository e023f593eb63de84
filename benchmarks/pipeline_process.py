"""One stage of the pipeline benchmark: `python pipeline_process.py JOB.json`, started by `pipeline.py`.

The stage's layers wait instead of computing. Rank 0 writes what was measured beside the job.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from workers import result_of

from megalm.config.load import load_recipe
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.world import joined_mesh
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.weight_gradients import WeightGradients

TOKENS, HIDDEN = 64, 256
"""Of a microbatch of one row: 64 KiB in fp32."""
HEAD_START_S = 0.05


class Clock:
    """Waits, and counts for how long."""

    def __init__(self) -> None:
        self.busy_s = 0.0

    def wait(self, seconds: float) -> None:
        """Wait at least so long."""
        begin = time.perf_counter()
        time.sleep(seconds)
        self.busy_s += time.perf_counter() - begin


@dataclass(frozen=True)
class OwedWait:
    """A weight gradient that takes its time and gives nothing."""

    clock: Clock
    seconds: float

    def pay(self) -> None:
        """Wait."""
        self.clock.wait(self.seconds)


class WaitingGradients(WeightGradients):
    """Weight gradients that are waits."""

    def owe(self, wait: Any) -> None:
        """Note a wait for later."""
        self._owed.append(wait)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: WaitingLayers) -> Tensor:
        ctx.layers = layers
        layers.clock.wait(layers.forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layers: WaitingLayers = ctx.layers
        if layers.splits:
            layers.clock.wait(layers.input_s)
            layers.gradients.owe(OwedWait(layers.clock, layers.weight_s))
        else:
            layers.clock.wait(layers.input_s + layers.weight_s)
        return gradient, None


class WaitingLayers(nn.Module):
    """A stage's chunks, each of which takes its part of the stage's times and hands its input on.

    With `splits` the weight gradients' part of a backward is put off, as by the model's linear layers.
    """

    def __init__(
        self, clock: Clock, gradients: WaitingGradients, times: dict[str, float], chunks: int, splits: bool
    ) -> None:
        super().__init__()
        self.clock, self.gradients, self.splits = clock, gradients, splits
        self.forward_s, self.input_s, self.weight_s = (times[name] / chunks for name in ("forward", "input", "weight"))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels_BT: Tensor | None = None, **rest: Any) -> Tensor:
        """Return the hidden state, or its sum where there are labels."""
        if not x.is_floating_point():
            x = self.scale.expand(1, TOKENS, HIDDEN).clone()
        x = _Layers.apply(x, self)
        return x if labels_BT is None else x.sum()


class Stage:
    """This rank's stage under one schedule, its layers waiting."""

    def __init__(self, mesh: ParallelMesh, name: str, job: dict[str, Any]) -> None:
        kind = SCHEDULES.get(name)
        chunks = kind.fixed_chunks or job["virtual_stages"]
        gradients = WaitingGradients()
        self.clock = Clock()
        self.executor = PipelineExecutor(
            WaitingLayers(self.clock, gradients, job["times"], chunks, kind.splits_backward),
            partial(kind, chunks=chunks),
            mesh,
            lambda rows, tokens: (rows, tokens, HIDDEN),
            torch.float32,
            gradients,
        )
        self._run(1)

    def _run(self, microbatches: int) -> None:
        tokens_BT = torch.zeros(1, TOKENS, dtype=torch.int64)
        batch = [Microbatch(tokens_BT, tokens_BT, tokens_BT.bool())] * microbatches
        self.executor.run(batch, 1.0, lambda: None)

    def step(self, microbatches: int) -> dict[str, float]:
        """Return a step's time and bubble, over all stages; on every rank."""
        self.clock.busy_s = 0.0
        begin = agreed_begin()
        self._run(microbatches)
        own = torch.tensor([time.perf_counter() - begin, self.clock.busy_s], dtype=torch.float64)
        seen = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(seen, own)
        ends, busy = torch.stack(seen).unbind(dim=1)
        step_s = ends.max().item()
        return {"step_s": step_s, "bubble": 1.0 - busy.mean().item() / step_s}


def agreed_begin() -> float:
    """Wait until a moment that all ranks of this machine take for the begin; its monotonic clock is one for all."""
    moment = torch.tensor([time.perf_counter() + HEAD_START_S], dtype=torch.float64)
    dist.broadcast(moment, src=0)
    time.sleep(max(0.0, moment.item() - time.perf_counter()))
    return moment.item()


def work(job_path: Path) -> None:
    """Do the job described in a file, and write rank 0's result beside it."""
    job = json.loads(job_path.read_text())
    torch.set_num_threads(1)
    keys = {"parallel.pipeline": job["stages"], "model.layers": job["stages"], "run.device": "cpu"}
    config = load_recipe("gpt-tiny", [f"{key}={value}" for key, value in keys.items()])
    measured: dict[str, dict[int, Any]] = {name: {n: [] for n in job["microbatches"]} for name in job["schedules"]}
    with joined_mesh(config) as mesh:
        stages = {name: Stage(mesh, name, job) for name in job["schedules"]}
        for _ in range(job["repeats"]):  # all in turn, so that what disturbs the machine for a while meets none alone
            for name, stage in stages.items():
                for count, steps in measured[name].items():
                    steps.append(stage.step(count))
        if mesh.rank == 0:
            result_of(job_path).write_text(json.dumps(measured))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
