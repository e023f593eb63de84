"""The forms of activations in a compiled graph compute what their formulas say, by programs without slow parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code

from megalm.nn.activations import geglu, gelu, relu
from tests.parity import reference_model
from tests.shards import assert_close

LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Some roundings of values and slopes, of 4e-3 each in bf16."""
X = torch.cat((torch.linspace(-9.0, 9.0, 63), torch.zeros(1))).double()
FORMS: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    gelu: reference_model.gelu,
    geglu: lambda x: reference_model.gelu(x[..., :32]) * x[..., 32:],
    relu: lambda x: x * (x > 0),
}


def value_and_slope(form: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the form at x, and the gradient of the sum of its values times their number + 1."""
    x = x.clone().requires_grad_()
    y = form(x)
    y.backward(torch.arange(1, y.numel() + 1).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_eager_and_compiled_forms_match_the_formula(form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x = X.to(dtype)
    expected = value_and_slope(FORMS[form], x.double())
    for run in (form, torch.compile(form, fullgraph=True, dynamic=False)):
        for what, actual, right in zip(("value", "slope"), value_and_slope(run, x), expected, strict=True):
            assert actual.dtype == dtype
            assert_close(actual.double(), right, f"{what} of {form.__name__}", LIMITS[dtype])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_programs_call_no_tanh_and_keep_no_mask(form: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    up, down = (torch.randn(64, 64, requires_grad=True) for _ in range(2))

    def mlp(x: Tensor) -> Tensor:
        h = form(F.linear(x, up))
        return F.linear(h, down[:, : h.shape[-1]])

    run = torch.compile(mlp, fullgraph=True, dynamic=False)
    _, programs = run_fw_bw_and_get_code(lambda: run(torch.randn(2, 16, 64)))
    assert len(programs) == 2, "forward and backward"
    for program in programs:
        assert "tanh(" not in program and "bool*" not in program, program
