"""Text from a model, token by token, under any tensor x pipeline layout.

Owns the loop and the way of one window through the stages. `sampling` draws; `command` loads a run and its
tokenizer. Each token costs a full forward pass over the window; a key/value cache is another
`NextTokenModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.errors import MegalmError
from megalm.generation.sampling import Sampling, draw_token
from megalm.pipeline_parallel.executor import Microbatch, PipelineExecutor

_NO_TOKEN = -1


class NextTokenModel(Protocol):
    """What the loop asks of a model. All ranks of the model's group call together, with the same tokens."""

    window: int
    """How many tokens it sees at most."""
    loss_stage: int
    """The pipeline stage that has the logits."""

    def next_logits(self, tokens: Sequence[int]) -> Tensor | None:
        """Return logits_V of the token after `tokens` (1 to `window`) on `loss_stage`, None elsewhere."""
        ...


class WindowModel:
    """A `NextTokenModel` that runs the whole window through all stages for every token.

    The executor's module must be built without sequence parallelism: windows have any length, which need not
    divide.
    """

    def __init__(self, executor: PipelineExecutor, mesh: ParallelMesh, *, window: int, vocab: int) -> None:
        assert mesh.size("data") == 1, f"{mesh.size('data')} data ranks would all generate the same text"
        self.window = window
        self.loss_stage = executor.loss_stage
        self._vocab = vocab
        self._executor = executor
        self._mesh = mesh

    def next_logits(self, tokens: Sequence[int]) -> Tensor | None:
        """Return logits_V, whole and without padding, on all ranks of `loss_stage`; None elsewhere."""
        assert 1 <= len(tokens) <= self.window, f"{len(tokens)} tokens in a window of {self.window}"
        tokens_1T = torch.tensor([list(tokens)], dtype=torch.int64, device=self._mesh.device)
        outputs = self._executor.forward_only([Microbatch(tokens_1T)])
        if not outputs:
            return None
        return gather_vocabulary(outputs[0][0, -1], self._mesh.group("tensor"), self._vocab)


def gather_vocabulary(logits_Vt: Tensor, group: dist.ProcessGroup, vocab: int) -> Tensor:
    """Return logits_V on every rank of the tensor group, in the order of the ranks, the padding cut off.

    All ranks of `group` call, each with its padded shard of ceil(vocab / ranks) columns.
    """
    if group.size() == 1:
        return logits_Vt[:vocab]
    parts = [torch.empty_like(logits_Vt) for _ in range(group.size())]
    dist.all_gather(parts, logits_Vt.contiguous(), group=group)
    return torch.cat(parts)[:vocab]


def generate_tokens(
    model: NextTokenModel,
    mesh: ParallelMesh,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: int,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens that continue `prompt`; the end-of-text token ends them unseen.

    The model sees the last `model.window` tokens. All ranks of the model's group iterate to the end together
    and get the same tokens: one rank of the stage with the logits draws and sends the token to all others.
    """
    assert prompt, "an empty prompt has no logits; begin with the end-of-text token"
    group = mesh.group("model")
    drawer = mesh.layout.rank(pipeline=model.loss_stage, data=mesh.coordinates.data, tensor=0)
    tokens = list(prompt)
    for draw in range(max_new_tokens):
        logits_V = model.next_logits(tokens[-model.window :])
        if group.size() == 1:
            assert logits_V is not None
            token = draw_token(logits_V, sampling, draw)
        else:
            token = _agreed_token(logits_V, sampling, draw, mesh, drawer)
        if token == end_of_text:
            return
        tokens.append(token)
        yield token


def _agreed_token(logits_V: Tensor | None, sampling: Sampling, draw: int, mesh: ParallelMesh, drawer: int) -> int:
    """Return the token that global rank `drawer` draws, on all ranks of the model's group."""
    message = torch.full((1,), _NO_TOKEN, dtype=torch.int64, device=mesh.device)
    error: MegalmError | None = None
    if mesh.rank == drawer:
        assert logits_V is not None
        try:
            message.fill_(draw_token(logits_V, sampling, draw))
        except MegalmError as caught:  # the others wait in the broadcast: tell them first
            error = caught
    dist.broadcast(message, drawer, group=mesh.group("model"))
    token = int(message.item())
    if token == _NO_TOKEN:
        raise error or MegalmError(f"rank {drawer} could draw no token; its own message says why")
    return token
