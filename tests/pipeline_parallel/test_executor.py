"""The executor on real processes gives the losses and gradients of plain autograd on one."""

from __future__ import annotations

import re
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor
from megalm.pipeline_parallel.partition import partition_layers
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import simulate
from tests.worker_pool import WorkerError, WorkerPool

VOCAB, HIDDEN, ROWS, TOKENS, LAYERS = 11, 6, 2, 5, 5
SCALE = 0.37


class Toy(nn.Module):
    """Layers `layers` of a small model; the hidden state's gradients are kept in `hidden_gradients`."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        self.layers = layers
        self.hidden_gradients: list[Tensor] = []
        self.first, self.last = layers.start == 0, layers.stop == LAYERS
        if self.first:
            self.embedding = nn.Parameter(torch.zeros(VOCAB, HIDDEN, dtype=torch.float64))
        self.blocks = nn.ModuleDict({str(i): nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64) for i in layers})
        if self.last:
            self.head = nn.Parameter(torch.zeros(VOCAB, HIDDEN, dtype=torch.float64))
        for name, parameter in self.named_parameters():  # the same on every stage, and in the whole model
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        dropout: float | None = None,
        tokens_BT: Tensor | None = None,
    ) -> Tensor:
        assert tokens_BT is not None, "every stage is told the tokens"
        assert labels_BT is None or loss_mask_BT is not None, "every stage is told the mask"
        if self.first:
            x = self.embedding[x]
        elif x.requires_grad:
            x.register_hook(self.hidden_gradients.append)
        for i in self.layers:
            x = x + torch.tanh(self.blocks[str(i)](x)) * (1.0 if dropout is None else dropout)
        if not self.last:
            assert labels_BT is None
            return x
        logits = x @ self.head.T
        if labels_BT is None:
            return logits
        assert loss_mask_BT is not None
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="none")
        return (losses * loss_mask_BT.flatten()).sum()


def make_microbatches(count: int, labels: bool = True, tokens: int = TOKENS) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(count)
    made = []
    for index in range(count):
        stream = torch.randint(VOCAB, (ROWS, tokens + 1), generator=generator)
        mask = torch.rand(ROWS, tokens, generator=generator) > 0.3
        made.append(
            Microbatch(
                tokens_BT=stream[:, :-1],
                labels_BT=stream[:, 1:] if labels else None,
                loss_mask_BT=mask if labels else None,
                dropout=0.5 + 0.1 * index,
            )
        )
    return made


def make_executor(mesh: ParallelMesh, schedule: str, microbatches: int) -> tuple[Toy, PipelineExecutor]:
    stages = mesh.size("pipeline")
    module = Toy(partition_layers(LAYERS, stages)[mesh.index("pipeline")])
    executor = PipelineExecutor(
        module,
        SCHEDULES.get(schedule),
        mesh,
        activation_shape=lambda rows, tokens: (rows, tokens, HIDDEN),
        dtype=torch.float64,
    )
    return module, executor


def call(module: Toy, microbatch: Microbatch) -> Tensor:
    labels, mask = microbatch.labels_BT, microbatch.loss_mask_BT
    tokens = microbatch.tokens_BT
    output: Tensor = module(tokens, labels_BT=labels, loss_mask_BT=mask, dropout=microbatch.dropout, tokens_BT=tokens)
    return output


def plain_step(microbatches: list[Microbatch]) -> tuple[float, dict[str, Tensor]]:
    module = Toy(range(LAYERS))
    total = 0.0
    for microbatch in microbatches:
        loss = call(module, microbatch)
        (loss * SCALE).backward()
        total += loss.item()
    return total, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def plain_hidden_gradients(microbatches: list[Microbatch], first_layer: int) -> list[Tensor]:
    below, above = Toy(range(first_layer)), Toy(range(first_layer, LAYERS))
    for microbatch in microbatches:
        tokens = microbatch.tokens_BT
        hidden = below(tokens, dropout=microbatch.dropout, tokens_BT=tokens).detach().requires_grad_()
        loss = above(hidden, microbatch.labels_BT, microbatch.loss_mask_BT, microbatch.dropout, tokens)
        (loss * SCALE).backward()
    return above.hidden_gradients


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-12 * expected.norm())


def check_step(mesh: ParallelMesh, schedule: str, count: int) -> None:
    """Run two steps, the second with its scale as a tensor, and compare with plain autograd."""
    microbatches = make_microbatches(count)
    loss, gradients = plain_step(microbatches)
    module, executor = make_executor(mesh, schedule, count)
    calls: list[bool] = []
    for scale in (SCALE, torch.tensor(SCALE, dtype=torch.float64)):
        module.zero_grad()
        module.hidden_gradients.clear()
        calls.clear()
        total = executor.run(
            microbatches,
            scale,
            lambda: calls.append(module.blocks[str(module.layers[0])].weight.grad is not None),
        )
        assert calls == [True] * count
        assert total.dtype is torch.float64 and total.shape == () and not total.requires_grad
        assert total.item() == pytest.approx(loss if mesh.is_last_stage else 0.0, rel=1e-13)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and close(parameter.grad, gradients[name]), name
    if not mesh.is_first_stage:
        expected = plain_hidden_gradients(microbatches, module.layers.start)
        assert len(module.hidden_gradients) == count
        assert all(close(a, b) for a, b in zip(module.hidden_gradients, expected, strict=True))
    simulation = simulate(SCHEDULES.get(schedule)(mesh.size("pipeline"), count))
    assert executor.peak_live == simulation.peak_live[mesh.index("pipeline")]


def check_steps(mesh: ParallelMesh, counts: list[int]) -> None:
    for schedule in ("gpipe", "1f1b"):
        for count in counts:
            check_step(mesh, schedule, count)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_gradients_losses_and_peak_are_those_of_plain_autograd(pool: WorkerPool, stages: int) -> None:
    pool.run(check_steps, [1, 2, 3, 4, 9], layout=RankLayout(pipeline=stages))


def test_pipelines_of_two_data_ranks_do_not_mix(pool: WorkerPool) -> None:
    pool.run(check_steps, [3], layout=RankLayout(pipeline=2, data=2))


def check_forward_only(mesh: ParallelMesh) -> None:
    _, executor = make_executor(mesh, "1f1b", 2)
    whole = Toy(range(LAYERS))
    for microbatches in (make_microbatches(5), make_microbatches(3, labels=False, tokens=2), []):
        outputs = executor.forward_only(microbatches)
        if not mesh.is_last_stage:
            assert outputs == []
            continue
        expected = [call(whole, microbatch) for microbatch in microbatches]
        assert [output.shape for output in outputs] == [output.shape for output in expected]
        assert all(close(a, b) and not a.requires_grad for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("stages", [1, 3])
def test_forward_only_gives_losses_or_logits_of_any_size_without_gradients(pool: WorkerPool, stages: int) -> None:
    pool.run(check_forward_only, layout=RankLayout(pipeline=stages))


class Watched(Toy):
    """Notes how many of its hidden states are still held by someone when a forward begins."""

    def __init__(self, layers: range) -> None:
        super().__init__(layers)
        self.made: list[Any] = []
        self.most_alive = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.most_alive = max(self.most_alive, sum(reference() is not None for reference in self.made))
        output = super().forward(x, *args, **kwargs)
        self.made.append(weakref.ref(output))
        return output


def check_outputs_are_let_go(mesh: ParallelMesh) -> int:
    module = Watched(partition_layers(LAYERS, 2)[mesh.index("pipeline")])
    schedule = SCHEDULES.get("gpipe")
    executor = PipelineExecutor(module, schedule, mesh, lambda rows, tokens: (rows, tokens, HIDDEN), torch.float64)
    executor.run(make_microbatches(12), SCALE, lambda: None)
    assert executor.peak_live == 12
    return module.most_alive


def test_outputs_are_not_held_for_the_backward(pool: WorkerPool) -> None:
    assert pool.run(check_outputs_are_let_go, layout=RankLayout(pipeline=2)) == [0, 0]


class Breaks(Toy):
    """Fails on the stage of layer 2: in its first backward, or in the first forward after it."""

    fails_in_backward = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(x, *args, **kwargs)
        if 2 in self.layers:
            if self.fails_in_backward:
                output.register_hook(self._fail)
            elif self.hidden_gradients:
                self._fail(output)
        return output

    def _fail(self, _: Tensor) -> None:
        raise ArithmeticError("planted")


def run_breaking(mesh: ParallelMesh, backward: bool) -> None:
    module = Breaks(partition_layers(LAYERS, 3)[mesh.index("pipeline")])
    module.fails_in_backward = backward
    schedule = SCHEDULES.get("1f1b")
    executor = PipelineExecutor(module, schedule, mesh, lambda rows, tokens: (rows, tokens, HIDDEN), torch.float64)
    executor.run(make_microbatches(4), SCALE, lambda: None)


@pytest.mark.parametrize(
    ("backward", "where"), [(False, "forward of microbatch 2"), (True, "backward of microbatch 0")]
)
def test_a_failing_module_is_named_and_the_other_stages_end_too(pool: WorkerPool, backward: bool, where: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        pool.run(run_breaking, backward, layout=RankLayout(pipeline=3), timeout_s=30)
    message = str(caught.value)
    assert re.search(rf"PipelineError: pipeline stage 1 failed in {where}: ArithmeticError: planted", message)
    assert "DistributedError: pipeline stage 0 lost a neighbouring stage at BACKWARD" in message
    assert time.monotonic() - started < 25
