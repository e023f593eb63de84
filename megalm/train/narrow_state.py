"""Optimizer state that is kept in bf16 between steps, rounded up or down with the chances of the distances.

Rounding to the nearest would lose what a step adds to an average of the squares: with beta2 = 0.999 a thousandth, and
bf16 numbers lie 1/256 apart. So rounded, the mean of what is kept is right (Gupta et al. 2015). The random bits are a
function of seed, update, parameter and element, so that a run does not depend on its layout or on a restart.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalm.distributed.random import key, words_of_part
from megalm.zero.parts import Part, PlacedOptimizer

_ELEMENTS = {"cpu": 1 << 19}  # that are widened at once: as many as stay in the cache
_ELEMENTS_ACCELERATOR = 1 << 22
_BITS = 16  # fewer in a bf16 than in a fp32 number
_UPPER_HALF = 1 if sys.byteorder == "little" else 0


class NarrowState(PlacedOptimizer):
    """Runs an optimizer of ours or torch's on pieces of the tensors, with their state widened for that time."""

    state_dtype = torch.bfloat16

    def __init__(self, inner: torch.optim.Optimizer, seed: int) -> None:
        super().__init__(inner.param_groups, {})
        self._inner, self._seed = inner, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                state = self.state[tensor]
                kinds = sorted(kind for kind, kept in state.items() if kind not in ("ema", "step"))
                most = _ELEMENTS.get(tensor.device.type, _ELEMENTS_ACCELERATOR)
                for part in self.parts[tensor]:
                    for start in range(0, part.length, most):
                        self._update(group, tensor, part, start, min(most, part.length - start), kinds)
                state["step"] = state.get("step", torch.zeros(())) + 1

    def _update(
        self, group: dict[str, Any], tensor: Tensor, part: Part, start: int, length: int, kinds: Sequence[str]
    ) -> None:
        """Update `length` elements from `start` on of a part; `kinds` of state were there before this step."""
        state, inner = self.state[tensor], self._inner
        steps = int(state.get("step", 0))
        at = slice(part.offset + start, part.offset + start + length)
        weights = tensor.detach().view(-1)[at]
        weights.grad = tensor.grad.view(-1)[at]  # type: ignore[union-attr]
        inner.param_groups = [{**group, "params": [weights]}]
        if kinds:
            place = weights.device if group.get("fused") or group.get("capturable") else "cpu"
            wide: dict[str, Any] = {kind: state[kind].view(-1)[at].to(weights.dtype) for kind in kinds}
            inner.state[weights] = {"step": torch.tensor(float(steps), device=place), **wide}
        inner.step()
        result = inner.state.pop(weights)
        stream = key(self._seed, "optimizer state", steps, part.shard.name)
        begin = part.start + start
        words = words_of_part(stream, part.shard, begin, begin + length, weights.device)
        made = sorted(kind for kind in result if kind != "step")
        assert len(made) <= 2, f"{made}: a word has bits for two"
        for kind in made:
            if kind not in state:
                state[kind] = torch.zeros_like(tensor, dtype=self.state_dtype, requires_grad=False)
            state[kind].view(-1)[at] = round_stochastically(result[kind], words)
            words = words >> _BITS  # the other half, for the second kind
        inner.param_groups = []


def round_stochastically(values: Tensor, words: Tensor) -> Tensor:
    """Return 1-D values in bf16: with chance d the neighbour farther from 0, d being how far the value is on to it.

    `words`: integers, whose lowest 16 bits are uniformly random. What is not finite stays what it is.
    """
    bits = values.float().view(torch.int32)  # sign and magnitude: adding is away from 0
    carried = words.to(torch.int32).bitwise_and_((1 << _BITS) - 1).add_(bits)
    rounded = carried.view(torch.int16)[_UPPER_HALF::2].view(torch.bfloat16)
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)  # a carry could reach a NaN's sign
