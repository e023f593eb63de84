"""The activations that a stage holds, in bytes, are as many as the schedule's formula says."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.models.build import build_executor, build_stage
from megalm.models.transformer import Transformer
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import simulate
from tests.parity.harness import Case
from tests.worker_pool import WorkerPool

STAGES, MICROBATCHES, ROWS, TOKENS, HIDDEN, VOCAB = 4, 10, 2, 64, 32, 11


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there; views of weights are not made."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.now = self.peak = 0
        there = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._seen = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)

    def look(self, *_: Any) -> None:
        """Note what there is between two actions; what an action needs while it runs does not count."""
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Held:
    """The most bytes that a stage held, those of a microbatch in a chunk, and the share that its weights still need."""

    peak: int
    unit: float
    kept: float


def units(model: Transformer, executor: PipelineExecutor, batch: Microbatch) -> tuple[float, float]:
    """Return the mean bytes over the stage's chunks after a forward, and after the first half of its backward."""
    held = []
    for chunk in range(len(model.plan.chunks)):
        hidden = torch.randn(ROWS, TOKENS, HIDDEN, requires_grad=True)
        x = batch.tokens_BT if model.plan.embeds(chunk) else hidden
        labels = (batch.labels_BT, batch.loss_mask_BT) if model.plan.predicts(chunk) else (None, None)
        with LiveBytes(model) as live:
            output = model(x, *labels, chunk=chunk)
            gradient = torch.ones_like(output)
            size = output.nbytes + gradient.nbytes  # the output is not kept by who runs the schedule
            after_forward = live.now - size + (0 if output.dim() == 0 else hidden.nbytes)
            torch.autograd.backward(output, gradient)
            owed = executor._weight_gradients.take()
            held.append((after_forward, live.now - size - (0 if hidden.grad is None else hidden.grad.nbytes)))
            del owed, output, gradient
        model.zero_grad(set_to_none=False)
    return tuple(sum(each) / len(held) for each in zip(*held, strict=True))  # type: ignore[return-value]


def hold(mesh: ParallelMesh, overrides: dict[str, Any]) -> Held:
    config = Case(STAGES, 1, 1, overrides).config()
    torch.manual_seed(0)
    model = build_stage(config, VOCAB, mesh)
    executor = build_executor(config, model, mesh)
    tokens_BT = torch.randint(VOCAB, (ROWS, TOKENS))
    batch = Microbatch(tokens_BT, tokens_BT, tokens_BT >= 0)
    executor.run([batch] * MICROBATCHES, 1.0, lambda: None)  # makes what stays: the gradients
    unit, kept = units(model, executor, batch)
    with LiveBytes(model) as live:
        model.register_forward_hook(live.look)
        executor.run([batch] * MICROBATCHES, 1.0, live.look)
    return Held(live.peak, unit, kept / unit)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_peak_bytes_are_those_of_the_formula(pool: WorkerPool, name: str) -> None:
    kind = SCHEDULES.get(name)
    chunks = {"parallel.virtual_stages": 2} if kind.fixed_chunks is None else {}
    shape = {"model.layers": 32, "model.hidden": HIDDEN, "model.sequence": TOKENS, "precision": "fp32"}
    reports = pool.run(hold, {"parallel.schedule": name, **shape, **chunks}, layout=RankLayout(pipeline=STAGES))
    schedule = kind(STAGES, MICROBATCHES, 2 if chunks else None)
    for stage, held in enumerate(reports):
        peak = simulate(schedule, kept=held.kept if kind.splits_backward else 0.0).peak_live[stage]
        assert held.peak == pytest.approx(peak * held.unit, rel=0.05), (stage, held, peak)
