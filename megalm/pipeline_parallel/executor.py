"""Runs one stage of a pipeline schedule with plain autograd and non-blocking messages.

Owns which tensors live between a microbatch's forward and its backward. It leaves the order of work to
`schedules`, transport to `distributed.p2p`, gradient accumulation to autograd and `zero`, and the weight of
the loss to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.distributed.launch import is_lost_peer
from megalm.distributed.mesh import Cargo, ParallelMesh
from megalm.distributed.p2p import Receipt, Route, StageLinks
from megalm.distributed.progress import progress
from megalm.errors import DistributedError, MegalmError
from megalm.pipeline_parallel.actions import Action, ActionKind, Placement, Schedule
from megalm.pipeline_parallel.weight_gradients import Owed, WeightGradients, pay


class PipelineError(MegalmError):
    """A stage's module failed: the message names stage and microbatch, `__cause__` is the module's error."""


@dataclass(frozen=True)
class Microbatch:
    """What one forward of one microbatch needs; every stage gets the same.

    Labels and mask are None where logits are wanted; `dropout` is passed to the module as it is (None: no
    dropout).
    """

    tokens_BT: Tensor
    labels_BT: Tensor | None = None
    loss_mask_BT: Tensor | None = None
    dropout: Any = None


class PipelineExecutor:
    """This rank's stage of the pipeline: the parts of the model it holds and its stream of actions.

    `module(x, labels_BT=, loss_mask_BT=, dropout=, tokens_BT=, chunk=)` runs one of them. It takes tokens where the
    model begins and the hidden state of the part before elsewhere, `tokens_BT` and `loss_mask_BT` being the same
    everywhere; it returns the loss sum (or logits, without labels) where the model ends, else the hidden state. The
    hidden state of a microbatch has the shape `activation_shape(rows, tokens)` and the dtype `dtype`.
    `schedule(stages, microbatches)` is called anew where a step has another number of microbatches. `weight_gradients`
    collects what the module's layers put off until the weight gradients' own actions. Receives are posted one action
    ahead, or, without `ahead`, when their action begins. After `run`, `peak_live` is the largest number of
    microbatches, each chunk counted, whose activations, or what their weight gradients need, were held at once.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Callable[[int, int], Schedule],
        mesh: ParallelMesh,
        activation_shape: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
        weight_gradients: WeightGradients | None = None,
        ahead: bool = True,
    ) -> None:
        self.peak_live = 0
        self._ahead = ahead
        self._module = module
        self._make_schedule, self._stages = schedule, mesh.layout.pipeline
        self._stage = mesh.coordinates.pipeline
        self._schedule = schedule(self._stages, 1)
        self._actions = tuple(self._schedule.actions(self._stage))
        self._placement = self._schedule.placement
        self._links = StageLinks(mesh, _routes(self._placement))
        self._activation_shape = activation_shape
        self._dtype = dtype
        self._loss_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self._device = mesh.device
        self._weight_gradients = weight_gradients or WeightGradients()
        self._handed: dict[Action, Tensor] = {}
        """Results that this stage has made for itself, under the action that needs them."""

    @property
    def loss_stage(self) -> int:
        """The pipeline stage that computes the loss."""
        return self._placement.last_stage

    def run(
        self,
        microbatches: Sequence[Microbatch],
        loss_scale: float | Tensor,
        after_backward: Callable[[], None],
    ) -> Tensor:
        """Run this stage's forwards and backwards of one step; return the detached loss sum, a scalar.

        All ranks of the pipeline axis must call. Gradients of `loss_scale` x loss are added to the
        parameters' `.grad`; `after_backward` is called after each action that may have made some. The loss is fp32
        (fp64 for a module of fp64), and zero on all stages but the loss's. Raises PipelineError when the module
        fails, DistributedError when a neighbouring stage is gone or silent until the collective time-out.
        """
        self._expect(len(microbatches))
        total = torch.zeros((), dtype=self._loss_dtype, device=self._device)
        scale = torch.as_tensor(loss_scale, dtype=self._loss_dtype, device=self._device)
        live: dict[tuple[int, int], tuple[Tensor | None, GradientEdge | None]] = {}
        owed: dict[tuple[int, int], list[Owed]] = {}
        self.peak_live = 0
        for action, message in self._receive(self._actions, microbatches):
            piece = action.microbatch, action.chunk
            if action.kind is ActionKind.FORWARD:
                live[piece] = self._train_forward(action, microbatches, message, total)
                self.peak_live = max(self.peak_live, len(live) + len(owed))
                continue
            if action.kind is not ActionKind.WEIGHT_GRADIENT:
                self._train_backward(action, *live.pop(piece), scale if message is None else message)
                after_backward()
                owed[piece] = self._weight_gradients.take()
            if action.kind is not ActionKind.INPUT_GRADIENT and self._pay(action, owed.pop(piece)):
                after_backward()
        self._drain()
        return total

    @torch.no_grad()
    def forward_only(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Return the loss stage's outputs, one a microbatch: loss sums where there are labels, else logits.

        All ranks of the pipeline axis must call, with microbatches of the same shapes, which may differ from
        those of training; [] on all other stages. Raises as `run` does. What the schedule's other actions left out
        leave waits for nothing else than before.
        """
        if not microbatches:
            return []
        self._expect(len(microbatches))
        outputs = []
        actions = [action for action in self._actions if action.kind is ActionKind.FORWARD]
        for action, message in self._receive(actions, microbatches):
            output = self._call_module(action, microbatches[action.microbatch], message)
            if self._makes_loss(action):
                outputs.append(output)
            else:
                self._pass_on(action, output, microbatches[action.microbatch])
        self._drain()
        return outputs

    def _expect(self, microbatches: int) -> None:
        """Take the schedule of so many microbatches."""
        if microbatches != self._schedule.microbatches:
            self._schedule = self._make_schedule(self._stages, microbatches)
            self._actions = tuple(self._schedule.actions(self._stage))
            self._links.allow(self._schedule.most_in_flight)

    def _train_forward(
        self, action: Action, microbatches: Sequence[Microbatch], hidden: Tensor | None, total: Tensor
    ) -> tuple[Tensor | None, GradientEdge | None]:
        """Run a forward; return what its backward needs: the places of the received and of the output in the graph.

        A model's begin whose weights are all frozen has no graph, and nothing to do in its backward.

        Neither tensor is kept here: what the backward needs of the received one is autograd's, and of the output it
        needs nothing, so on a sending stage its memory is free as soon as the message is through.
        """
        microbatch, place = microbatches[action.microbatch], None
        if hidden is not None:
            place = hidden.new_empty(()).expand(hidden.shape).requires_grad_()
            hidden = _Received.apply(place, hidden)
        output = self._call_module(action, microbatch, hidden)
        if self._makes_loss(action):
            total += output.detach()
        else:
            self._pass_on(action, output, microbatch)
        return place, get_gradient_edge(output) if output.requires_grad else None

    def _train_backward(
        self, action: Action, place: Tensor | None, output: GradientEdge | None, gradient: Tensor
    ) -> None:
        if output is None:
            return
        with self._naming_failure(action):
            torch.autograd.backward(output, gradient)
        if place is not None:
            assert place.grad is not None, f"stage {self._stage} does not use the hidden state it is given"
            self._pass_on(action, place.grad)

    def _pay(self, action: Action, owed: list[Owed]) -> bool:
        """Make the weight gradients that a backward has put off; return whether there were any."""
        if not owed:
            return False
        with self._naming_failure(action._replace(kind=ActionKind.WEIGHT_GRADIENT)):
            pay(owed)
        return True

    def _makes_loss(self, action: Action) -> bool:
        return self._placement.place(self._stage, action.chunk) == self._placement.places - 1

    def _call_module(self, action: Action, microbatch: Microbatch, hidden: Tensor | None) -> Tensor:
        is_last = self._makes_loss(action)
        with self._naming_failure(action):
            output: Tensor = self._module(
                microbatch.tokens_BT if hidden is None else hidden,
                labels_BT=microbatch.labels_BT if is_last else None,
                loss_mask_BT=microbatch.loss_mask_BT,
                dropout=microbatch.dropout,
                tokens_BT=microbatch.tokens_BT,
                chunk=action.chunk,
            )
        return output

    def _receive(
        self, actions: Sequence[Action], microbatches: Sequence[Microbatch]
    ) -> Iterator[tuple[Action, Tensor | None]]:
        """Yield each action with its message (or None), with `ahead` the next action's receive already posted.

        A neighbour may be so many messages ahead of what is asked for that neither way can deadlock.
        """
        posted = self._post(actions[0], microbatches) if actions and self._ahead else None
        for action, following in zip_longest(actions, actions[1:]):
            ahead = None
            if not self._ahead:
                posted = self._post(action, microbatches)
            elif following is not None:
                ahead = self._post(following, microbatches)
            if posted is None:
                yield action, self._handed_to(action)
            else:
                with self._naming_lost_neighbour(action):
                    message = posted.wait()
                yield action, message
            progress.acts += 1
            posted = ahead

    def _handed_to(self, action: Action) -> Tensor | None:
        """Return what this stage has made for the action itself; None where it needs nothing."""
        return None if self._schedule.source(self._stage, action) is None else self._handed.pop(_need(action))

    def _post(self, action: Action, microbatches: Sequence[Microbatch]) -> Receipt | None:
        source = self._schedule.source(self._stage, action)
        if source is None or source[0] == self._stage:
            return None
        with self._naming_lost_neighbour(action):
            shape = self._hidden_shape(microbatches[action.microbatch])
            return self._links.receive(_cargo(action), source[0], shape, self._dtype)

    def _pass_on(self, action: Action, result: Tensor, microbatch: Microbatch | None = None) -> None:
        """Give an activation, or a gradient, to the stage that needs it: another one or this one."""
        if microbatch is not None:
            expected = self._hidden_shape(microbatch)
            assert (*result.shape,) == expected and result.dtype is self._dtype, (
                f"stage {self._stage} made {tuple(result.shape)} {result.dtype}, not {expected} {self._dtype}"
            )
        target = self._schedule.target(self._stage, action)
        assert target is not None, f"nobody needs the result of {action} on stage {self._stage}"
        stage, needing = target
        if stage == self._stage:
            self._handed[needing] = result.detach()
            return
        with self._naming_lost_neighbour(action):
            self._links.send(_cargo(action), stage, result)

    def _drain(self) -> None:
        with self._naming_lost_neighbour("the end of the step"):
            self._links.drain()

    def _hidden_shape(self, microbatch: Microbatch) -> tuple[int, ...]:
        rows, tokens = microbatch.tokens_BT.shape
        return self._activation_shape(rows, tokens)

    @contextmanager
    def _naming_failure(self, action: Action) -> Iterator[None]:
        piece = f"{action.microbatch} of chunk {action.chunk}" if action.chunk else f"{action.microbatch}"
        try:
            with progress.doing(action.kind.value, piece):
                yield
        except Exception as error:
            if is_lost_peer(error):  # of the tensor or data axis: the module is not to blame
                raise
            reason = next(iter(str(error).splitlines()), "")
            raise PipelineError(
                f"pipeline stage {self._stage} failed in {action.kind.value} of microbatch {piece}: "
                f"{type(error).__name__}: {reason}"
            ) from error

    @contextmanager
    def _naming_lost_neighbour(self, where: Action | str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            raise DistributedError(
                f"pipeline stage {self._stage} lost a neighbouring stage at {where}; "
                f"the first error of the other ranks says why: {error}"
            ) from error


class _Received(torch.autograd.Function):
    """A received hidden state in the graph that begins at `place`, a tensor without memory, which gets its gradient."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _routes(placement: Placement) -> list[Route]:
    """Return who sends what to whom: activations to the holder of the next place, gradients back."""
    holders = [placement.holder(place)[0] for place in range(placement.places)]
    pairs = [(lower, upper) for lower, upper in pairwise(holders) if lower != upper]
    return [Route("activation", lower, upper) for lower, upper in pairs] + [
        Route("gradient", upper, lower) for lower, upper in pairs
    ]


def _cargo(action: Action) -> Cargo:
    return "activation" if action.kind is ActionKind.FORWARD else "gradient"


def _need(action: Action) -> Action:
    """Return the name under which an action's message waits: an input gradient waits for the same as a backward."""
    return action._replace(kind=ActionKind.BACKWARD) if action.kind is ActionKind.INPUT_GRADIENT else action
