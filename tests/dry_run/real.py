"""What a rank of a world that runs holds and sends in a step, beside the dry run of the same rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.dry_run.rank import DryRun
from megalm.dry_run.recording import MESSAGES, Call, Names, Recorder
from megalm.models.offload import Offload
from megalm.nn.router import Router
from megalm.train.trainer import Trainer
from megalm.zero.deepspeed_shapes import held_by_stage_3
from tests.parity.harness import build_trainer


@dataclass(frozen=True)
class Seen:
    """One rank's step: its calls in order, what its engine held, and the peak of bytes beside that."""

    calls: list[Call]
    held: dict[str, int]
    activations: int
    offloaded: int = 0


def observe(mesh: ParallelMesh, config: RunConfig) -> Seen:
    """Train a step for the optimizer's state, then three that are recorded, of which the least peak is the step's.

    Gloo's threads let go of a collective's tensors some time after it has ended, which the rank does not wait for.
    """
    trainer = build_trainer(mesh, config)
    with mock.patch.object(Router, "_choose", _choose_in_turn):
        trainer.train_step()
        return min((_observe_step(trainer, Names(mesh)) for _ in range(3)), key=lambda seen: seen.activations)


_CHOOSE = Router._choose


def _choose_in_turn(router: Router, scores: Tensor) -> Tensor:
    """Make the loads even, as a dry run takes them to be: token t goes to the experts from number t on."""
    tokens = torch.arange(scores.shape[1])[:, None] + torch.arange(router.chosen)
    return _CHOOSE(router, scores).copy_(tokens % router.experts)


def _observe_step(trainer: Trainer, names: Names) -> Seen:
    held: dict[str, int] = {}
    trainer.before_update = [lambda trainer: held.update(vars(trainer.engine.held_bytes()))]
    run = trainer.executor.run
    around, inside = Recorder(names), Recorder(names)

    def recorded(*arguments: Any) -> Tensor:
        nonlocal inside
        inside = Recorder(names, _make_gradients(trainer))
        around.__exit__(None, None, None)
        # On a CPU torch has attention without a matrix of scores, which the meta device, being no CPU, does not take.
        with sdpa_kernel(SDPBackend.MATH), inside:
            result = run(*arguments)
        around.__enter__()
        around.calls += inside.calls
        return result

    trainer.executor.run = recorded  # type: ignore[method-assign]
    try:
        with around:
            trainer.train_step()
    finally:
        trainer.executor.run = run  # type: ignore[method-assign]
    offload = trainer.engine.module.offload
    offloaded = offload.host_bytes.peak if isinstance(offload, Offload) else 0
    return Seen(around.calls, held, inside.peak, offloaded)


def _make_gradients(trainer: Trainer) -> list[Tensor]:
    """Return the tensors that are held through a step, gradients made beforehand where the engine adds to them."""
    engine: Any = trainer.engine
    if trainer.config.zero.stage == 3:
        return held_by_stage_3(engine.optimizer, engine.module)
    weights = list(engine.module.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    stage, narrow = trainer.config.zero.stage, weights[0].dtype in (torch.bfloat16, torch.float16)
    sums: list[Tensor] = []
    if stage == 0 or (stage == 1 and not narrow):
        kept = engine.masters if stage == 0 else trained
        for tensor in kept:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        sums = [*kept, *(tensor.grad for tensor in kept)]
    elif stage == 1:
        for weight in trained:
            weight.grad_accum = torch.zeros_like(weight, dtype=torch.float32)
        sums = [weight.grad_accum for weight in trained]
    return [*weights, *sums]


def by_axis(calls: list[Call]) -> dict[tuple[str, bool], list[Call]]:
    """Return the calls of each axis in order, messages apart from collectives."""
    found: dict[tuple[str, bool], list[Call]] = {}
    for call in calls:
        found.setdefault((call.axis, call.operation in MESSAGES), []).append(call)
    return found


def expected_calls(run: DryRun) -> list[Call]:
    """Return all that a dry run says of a step up to its update, in order."""
    calls = list(run.begin)
    for acted in run.actions:
        calls += run.calls_of(acted.action)
    calls += [*run.reduce, *run.update]
    return calls


def expected_messages(run: DryRun) -> dict[str, int]:
    """Return how many messages a dry run says that its rank receives and sends."""
    ends = {"receive": [a.receives for a in run.actions], "send": [a.sends for a in run.actions]}
    return {operation: sum(end is not None for end in found) for operation, found in ends.items()}
