"""Activations in one kernel each, whatever lies between the rows, and the two stages of the bias gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels import activations, launch, reference
from tests.kernels.checks import DEVICE, DTYPES, assert_as_good_as_plain, normal, poisoned

GATED = ("swiglu", "geglu")
PACKED = ("swiglu_packed", "geglu_packed")


def assert_agrees(name: str, *inputs: Tensor | None, output_gradients: list[Tensor] | None = None) -> None:
    """N numbers of mean 0 that are added one by one, as the interpreter does, err by 0.2 eps sqrt(N) of their sum."""
    x, bias = inputs if name == "bias_gelu" else (None, None)
    summed = x.numel() / bias.numel() if x is not None and bias is not None else 0.0
    function, oracle, floor = getattr(activations, name), getattr(reference, name), 1e-7 + 5e-8 * summed**0.5
    with poisoned():
        assert_as_good_as_plain(function, oracle, inputs, output_gradients=output_gradients, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 8200), (1025, 6), (2, 70, 129), (33,)])
@pytest.mark.parametrize("name", GATED)
def test_gated_values_and_gradients(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = (normal(*shape, dtype=dtype, scale=3.0) for _ in range(2))
    assert_agrees(name, gate, up)
    assert_agrees(f"{name}_packed", torch.cat((gate, up), dim=-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 4100), (2100, 6), (2, 70, 129), (33,)])
@pytest.mark.parametrize("biased", [True, False])
def test_gelu_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    x, bias = normal(*shape, dtype=dtype, scale=3.0), normal(shape[-1], dtype=dtype) if biased else None
    assert_agrees("bias_gelu", x, bias)


def test_a_bias_may_be_of_another_dtype() -> None:
    assert_agrees("bias_gelu", normal(70, 33, dtype=torch.bfloat16), normal(33))
    assert_agrees("bias_gelu", normal(70, 33), normal(33, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", [*GATED, *PACKED, "bias_gelu"])
def test_far_out_inputs_overflow_to_nothing_but_the_limits(name: str) -> None:
    """The square of 2e19 is no number of fp32, nor is the cube of 1e13."""
    ends = torch.tensor([20.0, 99.0, 101.0, 1e9, 1e13, 2e19, 1e30, 3e38], device=DEVICE)
    x = torch.cat((-ends, ends)).requires_grad_()
    one = torch.ones_like(ends).repeat(2)
    given = {"bias_gelu": (x, None), **dict.fromkeys(GATED, (x, one)), **dict.fromkeys(PACKED, (torch.cat((x, one)),))}
    y = getattr(activations, name)(*given[name])
    torch.testing.assert_close(y, F.relu(x), rtol=1e-6, atol=1e-7)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, (x > 0.0).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", GATED)
def test_halves_of_a_projection_are_read_where_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = normal(3, 7, 2 * 40, dtype=torch.bfloat16).requires_grad_(), normal(3, 7, 50, dtype=torch.bfloat16)
    function, packed = getattr(activations, name), getattr(activations, f"{name}_packed")
    (plain,) = torch.autograd.grad(function(*(half.contiguous() for half in x.chunk(2, -1))), x, dy[..., 5:45])
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", None)
        patch.setattr(Tensor, "copy_", None)
        (halves,) = torch.autograd.grad(function(*x.chunk(2, -1)), x, dy[..., 5:45])
        (whole,) = torch.autograd.grad(packed(x), x, dy[..., 5:45])
    assert torch.equal(halves, plain) and torch.equal(whole, plain) and whole.is_contiguous()


def test_expanded_and_transposed_inputs_and_gradients() -> None:
    across, transposed = normal(1, 6, 1).expand(5, 6, 10), normal(10, 6, 5).transpose(0, 2)
    for gate, up in ((across, transposed), (transposed, across)):
        for dy in (normal(1).expand(5, 6, 10), normal(10, 6, 5).permute(2, 1, 0)):
            assert_agrees("swiglu", gate, up, output_gradients=[dy])
            assert_agrees("bias_gelu", gate, normal(1).expand(10), output_gradients=[dy])
        dy = normal(5, 1, 1).expand(5, 6, 5)
        assert_agrees("geglu_packed", gate, output_gradients=[dy])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty_inputs_give_empty_outputs(shape: tuple[int, ...]) -> None:
    x, bias = (torch.empty(size, device=DEVICE, requires_grad=True) for size in (shape, shape[-1:]))
    functions: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (getattr(activations, name), (x,) if "packed" in name else (x, x)) for name in (*GATED, *PACKED)
    ]
    for function, inputs in (*functions, (activations.bias_gelu, (x, bias))):
        y = function(*inputs)
        y.sum().backward()
        assert y.numel() == 0 and x.grad is not None and x.grad.shape == shape
    assert bias.grad is not None and torch.equal(bias.grad, torch.zeros_like(bias))


def test_offsets_beyond_32_bits_are_not_cut_off() -> None:
    """The stride fits into 32 bits here, as it does in practice: only its multiple does not."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # of which few pages are ever touched
    x = memory.as_strided((3, 8), (2**30, 1)).copy_(normal(3, 8)).requires_grad_()
    for name in (*PACKED, "bias_gelu"):
        more = (normal(8),) if name == "bias_gelu" else ()
        (y, dx), (expected, expected_dx) = (
            (y, torch.autograd.grad(y.square().sum(), x)[0])
            for y in (getattr(module, name)(x, *more) for module in (activations, reference))
        )
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, expected_dx)


def test_the_bias_gradient_is_summed_in_fp32_and_in_a_fixed_order() -> None:
    """4097 rows whose sum in bf16 would stop at 256; the second stage adds what several programs summed."""
    x, bias = torch.full((4097, 3), 40.0, dtype=torch.bfloat16, device=DEVICE), torch.zeros(3, device=DEVICE)
    bias = bias.bfloat16().requires_grad_()
    activations.bias_gelu(x, bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad.float(), torch.full((3,), 4096.0, device=DEVICE))
    x, dy, bias = normal(3000, 9), normal(3000, 9), normal(9)
    runs = [torch.ops.megalm.bias_gelu_backward(dy, x, bias)[1] for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activations.swiglu(torch.zeros(2, 3), torch.zeros(3)), r"swiglu of gate \(2, 3\).*give both as"),
        (lambda: activations.geglu(torch.zeros(3), torch.zeros(3).half()), r"up \(3,\) torch.float16; .*of one dtype"),
        (lambda: activations.swiglu(torch.zeros(()), torch.zeros(())), r"give both as \[..., F\]"),
        (lambda: activations.swiglu_packed(torch.zeros(2, 3)), r"swiglu_packed of shape \(2, 3\).*it is even"),
        (lambda: activations.geglu_packed(torch.zeros(())), r"geglu_packed of shape \(\)"),
        (lambda: activations.bias_gelu(torch.zeros(2, 3), torch.zeros(2)), r"shape \(2, 3\) with bias \(2,\); give"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def inputs_of(name: str) -> tuple[Tensor | None, ...]:
    x = normal(3, 8)
    return (x, normal(8)) if name == "bias_gelu" else (x,) if name in PACKED else (x, normal(3, 8))


@pytest.mark.parametrize("name", [*GATED, *PACKED, "bias_gelu"])
def test_the_reference_serves_where_there_is_no_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = getattr(activations, name), inputs_of(name)
    expected = function(*inputs)
    double = function(*(x if x is None else x.double() for x in inputs))
    assert double.dtype is torch.float64
    torch.testing.assert_close(double.float(), expected)
    monkeypatch.setattr(launch, "fused", lambda *tensors: False)
    torch.testing.assert_close(function(*inputs), expected)


def test_the_operations_are_registered_as_torch_wants_them() -> None:
    x, dy = normal(3, 8).requires_grad_(), normal(3, 8)
    ops = torch.ops.megalm
    cases = {
        ops.gated_forward: (x, normal(3, 8).requires_grad_(), True),
        ops.gated_backward: (dy, x.detach(), normal(3, 8), False),
        ops.gated_packed_forward: (x, False),
        ops.gated_packed_backward: (dy[:, :4], x.detach(), True),
        ops.bias_gelu_forward: (x, normal(8).requires_grad_()),
        ops.bias_gelu_backward: (dy, x.detach(), None),
    }
    for operation, arguments in cases.items():
        torch.library.opcheck(operation.default, arguments)


def test_compiled_code_holds_the_operations() -> None:
    def layer(x: Tensor, bias: Tensor) -> Tensor:
        gate, up = activations.bias_gelu(x, bias).chunk(2, dim=-1)
        return activations.swiglu(gate, up) * activations.geglu_packed(activations.bias_gelu(x, None))

    inputs = [normal(3, 8).requires_grad_(), normal(8).requires_grad_()]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(function(*inputs).sum(), inputs) for function in (compiled, layer))
    torch.testing.assert_close(actual, expected)
