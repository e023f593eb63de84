"""Runs one stage of a pipeline schedule with plain autograd and non-blocking messages.

Owns which tensors live between a microbatch's forward and its backward. It leaves the order of work to
`schedules`, transport to `distributed.p2p`, gradient accumulation to autograd and `zero`, and the weight of
the loss to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.distributed.launch import is_lost_peer
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.p2p import Receipt, StageLinks
from megalm.distributed.progress import progress
from megalm.errors import DistributedError, MegalmError
from megalm.pipeline_parallel.schedules import Action, ActionKind, Schedule


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
    """This rank's stage of the pipeline: the part of the model it holds and its stream of actions.

    `module(x, labels_BT=, loss_mask_BT=, dropout=, tokens_BT=)` takes tokens on the first stage and the hidden state
    of the stage before on later ones, `tokens_BT` and `loss_mask_BT` being the same on all of them; it returns the loss
    sum (or logits, without labels) on the last stage, else the hidden state. `activation_shape(rows, tokens)` is the
    hidden state's shape for a microbatch of that size, `dtype` its dtype. `schedule` is made anew where a step has
    another number of microbatches. After `run`, `peak_live` is the largest number of microbatches whose activations
    were held at once.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Callable[[int, int], Schedule],
        mesh: ParallelMesh,
        activation_shape: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self.peak_live = 0
        self._module = module
        self._schedule, self._stages = schedule, mesh.layout.pipeline
        self._stage = mesh.coordinates.pipeline
        self._microbatches, self._actions = 0, tuple[Action, ...]()
        self._is_first, self._is_last = mesh.is_first_stage, mesh.is_last_stage
        self._links = StageLinks(mesh)
        self._activation_shape = activation_shape
        self._dtype = dtype
        self._loss_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self._device = mesh.device

    def run(
        self,
        microbatches: Sequence[Microbatch],
        loss_scale: float | Tensor,
        after_backward: Callable[[], None],
    ) -> Tensor:
        """Run this stage's forwards and backwards of one step; return the detached loss sum, a scalar.

        All ranks of the pipeline axis must call. Gradients of `loss_scale` x loss are added to the
        parameters' `.grad`; `after_backward` is called after each microbatch's backward. The loss is fp32
        (fp64 for a module of fp64), and zero on all stages but the last. Raises PipelineError when the module
        fails, DistributedError when a neighbouring stage is gone or silent until the collective time-out.
        """
        if len(microbatches) != self._microbatches:
            self._microbatches = len(microbatches)
            self._actions = tuple(self._schedule(self._stages, self._microbatches).actions(self._stage))
        total = torch.zeros((), dtype=self._loss_dtype, device=self._device)
        scale = torch.as_tensor(loss_scale, dtype=self._loss_dtype, device=self._device)
        live: dict[int, tuple[Tensor | None, GradientEdge | None]] = {}
        self.peak_live = 0
        for action, message in self._receive(self._actions, microbatches):
            if action.kind is ActionKind.FORWARD:
                live[action.microbatch] = self._train_forward(action, microbatches, message, total)
                self.peak_live = max(self.peak_live, len(live))
            else:
                self._train_backward(action, *live.pop(action.microbatch), scale if message is None else message)
                after_backward()
        self._drain()
        return total

    @torch.no_grad()
    def forward_only(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Return the last stage's outputs, one a microbatch: loss sums where there are labels, else logits.

        All ranks of the pipeline axis must call, with microbatches of the same shapes, which may differ from
        those of training; [] on all stages but the last. Raises as `run` does.
        """
        outputs = []
        actions = [Action(ActionKind.FORWARD, index) for index in range(len(microbatches))]
        for action, message in self._receive(actions, microbatches):
            output = self._call_module(action, microbatches[action.microbatch], message)
            if self._is_last:
                outputs.append(output)
            else:
                self._send(action, microbatches[action.microbatch], output)
        self._drain()
        return outputs

    def _train_forward(
        self, action: Action, microbatches: Sequence[Microbatch], hidden: Tensor | None, total: Tensor
    ) -> tuple[Tensor | None, GradientEdge | None]:
        """Run a forward; return what its backward needs: the received leaf, the output's place in the graph.

        A first stage whose weights are all frozen has no graph, and nothing to do in its backward.

        The output itself is not kept: backward does not need its value, so on a sending stage its memory is
        free as soon as the message is through.
        """
        microbatch = microbatches[action.microbatch]
        if hidden is not None:
            hidden.requires_grad_()
        output = self._call_module(action, microbatch, hidden)
        if self._is_last:
            total += output.detach()
        else:
            self._send(action, microbatch, output)
        return hidden, get_gradient_edge(output) if output.requires_grad else None

    def _train_backward(
        self, action: Action, hidden: Tensor | None, output: GradientEdge | None, gradient: Tensor
    ) -> None:
        if output is None:
            return
        with self._naming_failure(action):
            torch.autograd.backward(output, gradient)
        if hidden is not None:
            assert hidden.grad is not None, f"stage {self._stage} does not use the hidden state it is given"
            with self._naming_lost_neighbour(action):
                self._links.send_backward(hidden.grad)

    def _call_module(self, action: Action, microbatch: Microbatch, hidden: Tensor | None) -> Tensor:
        with self._naming_failure(action):
            output: Tensor = self._module(
                microbatch.tokens_BT if hidden is None else hidden,
                labels_BT=microbatch.labels_BT if self._is_last else None,
                loss_mask_BT=microbatch.loss_mask_BT,
                dropout=microbatch.dropout,
                tokens_BT=microbatch.tokens_BT,
            )
        return output

    def _receive(
        self, actions: Sequence[Action], microbatches: Sequence[Microbatch]
    ) -> Iterator[tuple[Action, Tensor | None]]:
        """Yield each action with its message (or None), the receive of the next action already posted."""
        posted = self._post(actions[0], microbatches) if actions else None
        for action, following in zip_longest(actions, actions[1:]):
            ahead = self._post(following, microbatches) if following is not None else None
            if posted is None:
                yield action, None
            else:
                with self._naming_lost_neighbour(action):
                    message = posted.wait()
                yield action, message
            progress.acts += 1
            posted = ahead

    def _post(self, action: Action, microbatches: Sequence[Microbatch]) -> Receipt | None:
        is_forward = action.kind is ActionKind.FORWARD
        if self._is_first if is_forward else self._is_last:
            return None
        receive = self._links.receive_forward if is_forward else self._links.receive_backward
        with self._naming_lost_neighbour(action):
            return receive(self._hidden_shape(microbatches[action.microbatch]), self._dtype)

    def _send(self, action: Action, microbatch: Microbatch, output: Tensor) -> None:
        expected = self._hidden_shape(microbatch)
        assert (*output.shape,) == expected and output.dtype is self._dtype, (
            f"stage {self._stage} made {tuple(output.shape)} {output.dtype}, not {expected} {self._dtype}"
        )
        with self._naming_lost_neighbour(action):
            self._links.send_forward(output)

    def _drain(self) -> None:
        with self._naming_lost_neighbour("the end of the step"):
            self._links.drain()

    def _hidden_shape(self, microbatch: Microbatch) -> tuple[int, ...]:
        rows, tokens = microbatch.tokens_BT.shape
        return self._activation_shape(rows, tokens)

    @contextmanager
    def _naming_failure(self, action: Action) -> Iterator[None]:
        try:
            with progress.doing(action.kind.value, action.microbatch):
                yield
        except Exception as error:
            if is_lost_peer(error):  # of the tensor or data axis: the module is not to blame
                raise
            reason = next(iter(str(error).splitlines()), "")
            raise PipelineError(
                f"pipeline stage {self._stage} failed in {action.kind.value} of microbatch "
                f"{action.microbatch}: {type(error).__name__}: {reason}"
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
