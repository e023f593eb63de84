"""Holds a layer that is split over the tensor axis against a formula over its whole weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megalm.config.run import ModelSection
from megalm.distributed.mesh import ParallelMesh
from megalm.nn.ops import REFERENCE
from megalm.tensor_parallel.initialize import Initializer
from tests.parity.reference_model import Weights
from tests.shards import assert_close, assert_gradients_close, fill, random_whole

OPERATIONS = REFERENCE
INIT = Initializer(seed=1, dtype=torch.float64, device=torch.device("cpu"))
ROWS = 2

GPT: dict[str, Any] = {"layers": 2, "hidden": 8, "heads": 4, "sequence": 8, "ffn": 12}
LLAMA: dict[str, Any] = {
    **GPT, "norm": "rmsnorm", "activation": "swiglu", "position": "rotary", "kv_heads": 2, "bias": False,
}  # fmt: skip
GROUPED: dict[str, Any] = {**GPT, "kv_heads": 2, "position": "rotary", "bias": True, "activation": "swiglu"}
MODELS = (GPT, LLAMA, GROUPED)
LATENT: dict[str, Any] = {**LLAMA, "kv_heads": None, "kv_rank": 6}
LATENT_MODELS: tuple[dict[str, Any], ...] = (
    {**LATENT, "nope_head_dim": 4, "rope_head_dim": 2},
    {**LATENT, "q_rank": 5, "rope_head_dim": 4, "nope_head_dim": 3, "value_head_dim": 2, "norm": "layernorm"},
)


def model_section(**values: Any) -> ModelSection:
    """Return a model section; what is not given is GPT's."""
    return ModelSection.model_validate({**GPT, **values})


def tokens_here(x_BTD: Tensor, mesh: ParallelMesh, sequence: bool) -> Tensor:
    """Return this tensor rank's tokens under sequence parallelism, else all."""
    return x_BTD.chunk(mesh.size("tensor"), dim=1)[mesh.index("tensor")] if sequence else x_BTD


def check_layer(
    mesh: ParallelMesh,
    layer: nn.Module,
    call: Callable[[Tensor], Tensor],
    formula: Callable[[Tensor, Weights], Tensor],
    config: ModelSection,
    sequence: bool,
) -> None:
    """Compare output, input gradient and weight gradients of x_BTD -> y_BTD (x_BTtD -> y_BTtD with `sequence`)."""
    wholes = fill(layer, scale=0.5)
    shape = (ROWS, config.sequence, config.hidden)
    x, dy = random_whole("x", shape).requires_grad_(), random_whole("dy", shape)
    expected = formula(x, wholes)
    expected.backward(dy)
    assert x.grad is not None
    mine = tokens_here(x.detach(), mesh, sequence).clone().requires_grad_()
    actual = call(mine)
    actual.backward(tokens_here(dy, mesh, sequence))
    assert mine.grad is not None
    assert_close(actual, tokens_here(expected, mesh, sequence), "output")
    assert_close(mine.grad, tokens_here(x.grad, mesh, sequence), "input gradient")
    assert_gradients_close(layer, wholes)
