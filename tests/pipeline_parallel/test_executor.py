"""The executor on real processes gives the losses and gradients of plain autograd on one."""

from __future__ import annotations

import functools
import re
import time
import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.p2p import Receipt, StageLinks
from megalm.distributed.progress import progress
from megalm.pipeline_parallel.actions import Placement, Schedule
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor
from megalm.pipeline_parallel.partition import partition_layers
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import simulate
from megalm.pipeline_parallel.weight_gradients import WeightGradients
from tests.worker_pool import WorkerError, WorkerPool

VOCAB, HIDDEN, ROWS, TOKENS, LAYERS = 11, 6, 2, 5, 8
SCALE = 0.37
CHUNKS = {"interleaved": 2, "breadth-first": 2}


def make_schedule(name: str, stages: int, microbatches: int) -> Schedule:
    return SCHEDULES.get(name)(stages, microbatches, CHUNKS.get(name))


class Toy(nn.Module):
    """Runs of layers of a small model; the gradients of the hidden state before layer i are kept in its list i."""

    def __init__(self, *chunks: range) -> None:
        super().__init__()
        self.chunks = chunks
        self.layers = [layer for layers in chunks for layer in layers]
        self.hidden_gradients: dict[int, list[Tensor]] = {layers.start: [] for layers in chunks if layers.start}
        self.first, self.last = 0 in self.layers, LAYERS - 1 in self.layers
        self.linear = nn.functional.linear
        if self.first:
            self.embedding = nn.Parameter(torch.zeros(VOCAB, HIDDEN, dtype=torch.float64))
        self.blocks = nn.ModuleDict({str(i): nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64) for i in self.layers})
        self.gains = nn.ParameterDict({str(i): torch.zeros(HIDDEN, dtype=torch.float64) for i in self.layers})
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
        chunk: int = 0,
    ) -> Tensor:
        assert tokens_BT is not None, "every stage is told the tokens"
        assert labels_BT is None or loss_mask_BT is not None, "every stage is told the mask"
        layers = self.chunks[chunk]
        if layers.start == 0:
            x = self.embedding[x]
        elif x.requires_grad:
            x.register_hook(self.hidden_gradients[layers.start].append)
        for i in layers:
            block, gain = self.blocks[str(i)], self.gains[str(i)]
            x = x + gain * torch.tanh(self.linear(x, block.weight, block.bias)) * (1.0 if dropout is None else dropout)
        if layers.stop < LAYERS:
            assert labels_BT is None
            return x
        logits = x @ self.head.T
        if labels_BT is None:
            return logits
        assert loss_mask_BT is not None
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="none")
        return (losses * loss_mask_BT.flatten()).sum()


def chunks_of(placement: Placement, stage: int) -> list[range]:
    layers = partition_layers(LAYERS, placement)
    return [layers[placement.place(stage, chunk)] for chunk in range(placement.chunks)]


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


def executor_of(module: Toy, mesh: ParallelMesh, schedule: str, ahead: bool = True) -> PipelineExecutor:
    weight_gradients = WeightGradients()
    if SCHEDULES.get(schedule).splits_backward:
        module.linear = weight_gradients.linear  # type: ignore[assignment]
    return PipelineExecutor(
        module,
        functools.partial(make_schedule, schedule),
        mesh,
        activation_shape=lambda rows, tokens: (rows, tokens, HIDDEN),
        dtype=torch.float64,
        weight_gradients=weight_gradients,
        ahead=ahead,
    )


def make_executor(
    mesh: ParallelMesh, schedule: str, kind: type[Toy] = Toy, ahead: bool = True
) -> tuple[Any, PipelineExecutor]:
    placement = make_schedule(schedule, mesh.size("pipeline"), 1).placement
    module = kind(*chunks_of(placement, mesh.index("pipeline")))
    return module, executor_of(module, mesh, schedule, ahead)


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
    return above.hidden_gradients[first_layer]


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-12 * expected.norm())


def check_step(mesh: ParallelMesh, schedule: str, count: int, ahead: bool = True) -> None:
    """Run two steps, the second with its scale as a tensor, and compare with plain autograd."""
    microbatches = make_microbatches(count)
    loss, gradients = plain_step(microbatches)
    module, executor = make_executor(mesh, schedule, ahead=ahead)
    calls: list[bool] = []
    for scale in (SCALE, torch.tensor(SCALE, dtype=torch.float64)):
        module.zero_grad()
        for kept in module.hidden_gradients.values():
            kept.clear()
        calls.clear()
        total = executor.run(
            microbatches, scale, lambda: calls.append(any(gain.grad is not None for gain in module.gains.values()))
        )
        passes = count * len(module.chunks)
        assert calls == [True] * passes * (2 if SCHEDULES.get(schedule).splits_backward else 1)
        assert total.dtype is torch.float64 and total.shape == () and not total.requires_grad
        here = executor.loss_stage == mesh.index("pipeline")
        assert here is module.last and total.item() == pytest.approx(loss if here else 0.0, rel=1e-13)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and close(parameter.grad, gradients[name]), name
    for first_layer, kept in module.hidden_gradients.items():
        expected = plain_hidden_gradients(microbatches, first_layer)
        assert len(kept) == count
        assert all(close(a, b) for a, b in zip(kept, expected, strict=True))
    simulation = simulate(make_schedule(schedule, mesh.size("pipeline"), count))
    assert executor.peak_live == simulation.peak_live[mesh.index("pipeline")]
    assert not executor._handed


def check_steps(mesh: ParallelMesh, schedule: str, counts: list[int]) -> None:
    for count in counts:
        check_step(mesh, schedule, count)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_gradients_losses_and_peak_are_those_of_plain_autograd(pool: WorkerPool, schedule: str, stages: int) -> None:
    pool.run(check_steps, schedule, [1, 2, 3, 4, 9], layout=RankLayout(pipeline=stages))


def most_asked_for(mesh: ParallelMesh, schedule: str) -> list[int]:
    """Return how many messages are asked for at most while the stage's forwards run, without `ahead` and with it."""
    found = []
    for ahead in (False, True):
        check_step(mesh, schedule, 5, ahead)
        module, executor = make_executor(mesh, schedule, ahead=ahead)
        asked, most = [0], [0]
        receive, wait = StageLinks.receive, Receipt.wait

        def post(self: Any, *arguments: Any, receive: Any = receive, asked: list[int] = asked) -> Any:
            asked[0] += 1
            return receive(self, *arguments)

        def take(self: Any, wait: Any = wait, asked: list[int] = asked) -> Any:
            asked[0] -= 1
            return wait(self)

        def look(*_: Any, asked: list[int] = asked, most: list[int] = most) -> None:
            most[0] = max(most[0], asked[0])

        module.register_forward_pre_hook(look)
        with mock.patch.object(StageLinks, "receive", post), mock.patch.object(Receipt, "wait", take):
            executor.run(make_microbatches(5), 1.0, lambda: None)
        assert asked == [0]
        found += most
    return found


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_a_receive_is_posted_ahead_or_when_it_is_needed(pool: WorkerPool, schedule: str) -> None:
    without, ahead = zip(*pool.run(most_asked_for, schedule, layout=RankLayout(pipeline=3)), strict=True)
    assert without == (0, 0, 0) and max(ahead) == 1


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_pipelines_of_two_data_ranks_do_not_mix(pool: WorkerPool, schedule: str) -> None:
    pool.run(check_steps, schedule, [3], layout=RankLayout(pipeline=2, data=2))


class Names:
    """What the work is called that is done."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def phase(self, name: str) -> None:
        raise AssertionError(f"no phase begins: {name}")

    def work(self, kind: str, what: object) -> nullcontext[None]:
        if kind != "communication":
            self.seen.append(f"{kind} {what}")
        return nullcontext()


def names_of_a_step(mesh: ParallelMesh, schedule: str) -> list[str]:
    _, executor = make_executor(mesh, schedule)
    names = Names()
    progress.observer = names
    try:
        executor.run(make_microbatches(2), SCALE, lambda: None)
    finally:
        progress.observer = None
    return names.seen


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        ("1f1b", {"forward 0", "forward 1", "backward 0", "backward 1"}),
        (
            "zb-v",
            {
                f"{kind} {microbatch}{chunk}"
                for kind in ("forward", "input gradient", "weight gradient")
                for microbatch in (0, 1)
                for chunk in ("", " of chunk 1")
            },
        ),
    ],
)
def test_each_piece_of_work_is_said_once_by_a_name_of_its_own(pool: WorkerPool, schedule: str, names: set[str]) -> None:
    for seen in pool.run(names_of_a_step, schedule, layout=RankLayout(pipeline=2)):
        assert sorted(seen) == sorted(names)


def check_another_number_of_microbatches(mesh: ParallelMesh, schedule: str) -> None:
    module, executor = make_executor(mesh, schedule)
    for count in (1, 6, 3, 12):
        gradients = plain_step(make_microbatches(count))[1]
        module.zero_grad()
        executor.run(make_microbatches(count), SCALE, lambda: None)
        assert all(close(p.grad, gradients[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_the_number_of_microbatches_may_change_from_step_to_step(pool: WorkerPool, schedule: str) -> None:
    pool.run(check_another_number_of_microbatches, schedule, layout=RankLayout(pipeline=2))


def check_forward_only(mesh: ParallelMesh, schedule: str) -> None:
    _, executor = make_executor(mesh, schedule)
    whole = Toy(range(LAYERS))
    for microbatches in (make_microbatches(5), make_microbatches(3, labels=False, tokens=2), []):
        outputs = executor.forward_only(microbatches)
        if mesh.index("pipeline") != executor.loss_stage:
            assert outputs == []
            continue
        expected = [call(whole, microbatch) for microbatch in microbatches]
        assert [output.shape for output in outputs] == [output.shape for output in expected]
        assert all(close(a, b) and not a.requires_grad for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("schedule", "stages"), [("1f1b", 1), ("1f1b", 3), ("interleaved", 3), ("breadth-first", 2), ("dualpipe-v", 3)]
)
def test_forward_only_gives_losses_or_logits_of_any_size_without_gradients(
    pool: WorkerPool, schedule: str, stages: int
) -> None:
    pool.run(check_forward_only, schedule, layout=RankLayout(pipeline=stages))


class Watched(Toy):
    """Notes how many of its hidden states are still held by someone when a forward begins."""

    def __init__(self, *chunks: range) -> None:
        super().__init__(*chunks)
        self.made: list[Any] = []
        self.most_alive = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.most_alive = max(self.most_alive, sum(reference() is not None for reference in self.made))
        output = super().forward(x, *args, **kwargs)
        self.made.append(weakref.ref(output))
        return output


def check_outputs_are_let_go(mesh: ParallelMesh) -> int:
    module, executor = make_executor(mesh, "gpipe", Watched)
    executor.run(make_microbatches(12), SCALE, lambda: None)
    assert executor.peak_live == 12
    return module.most_alive


def test_outputs_are_not_held_for_the_backward(pool: WorkerPool) -> None:
    assert pool.run(check_outputs_are_let_go, layout=RankLayout(pipeline=2)) == [0, 0]


class Breaks(Toy):
    """Fails on the stage of layer 3: in its first backward, or in the first forward after it."""

    fails_in_backward = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(x, *args, **kwargs)
        if 3 in self.layers:
            if self.fails_in_backward:
                output.register_hook(self._fail)
            elif any(self.hidden_gradients.values()):
                self._fail(output)
        return output

    def _fail(self, _: Tensor) -> None:
        raise ArithmeticError("planted")


def run_breaking(mesh: ParallelMesh, backward: bool) -> None:
    module, executor = make_executor(mesh, "1f1b", Breaks)
    module.fails_in_backward = backward
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
