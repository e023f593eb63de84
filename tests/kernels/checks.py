"""What the tests of all kernels share: devices, dtypes, fresh seeds, poisoned memory, and the rule of accuracy."""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm.kernels import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = launch.DTYPES

RUN_SEED = int(os.environ.get("MEGALM_TEST_SEED") or secrets.randbits(32))
_drawn: collections.Counter[str] = collections.Counter()


def fresh_seed() -> int:
    """Return a seed that differs with the run, the test, and the call within the test.

    MEGALM_TEST_SEED set to what a failure prints repeats all of a run's seeds, whatever other tests run.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    _drawn[test] += 1
    print(f"MEGALM_TEST_SEED={RUN_SEED}")  # pytest shows it where the test fails
    return zlib.crc32(f"{RUN_SEED}/{test}/{_drawn[test]}".encode())


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return fresh normal numbers on DEVICE."""
    generator = torch.Generator().manual_seed(fresh_seed())
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Have new memory (torch.empty and all its kin, also inside operations) hold NaN, or an integer type's maximum."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Any], output_gradients: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the outputs and the gradients of those inputs that are floating-point tensors.

    Each output has its gradient among `output_gradients`, cast to its dtype; where there are none, normal numbers.
    """
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
    given = function(*leaves)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, output_gradients, strict=True) if y.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        ys, dys = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(ys, wanted, dys, allow_unused=True)
    return [y.detach() for y in outputs], list(gradients)


def assert_as_good_as_plain(
    fused_fn: Callable[..., Any],
    reference_fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    names: Sequence[str] = (),
    output_gradients: Sequence[Tensor] | None = None,
    floor: float = 1e-7,
    gradient_floor: float | None = None,
) -> None:
    """Fail unless outputs and gradients of `fused_fn(*inputs)` are at most twice as wrong as those of plain torch.

    Errors are L2, relative to `reference_fn` of the inputs' float64 copies; plain torch is `reference_fn` of the
    inputs. Both functions return a tensor or several. Every floating-point tensor among the inputs gets a gradient,
    which `names` name in messages; other inputs are passed as they are. `output_gradients` are fresh normal numbers
    where None is given, rounded to the outputs' dtypes before all three use them.

    Two allowances are added. `floor`: fp32 sums in another order (1e-7 is about two roundings of fp32); gradients have
    `gradient_floor` in its place where it is given. And
    u / sqrt(n), where u is the rounding error of the dtype and n the number of elements: plain torch's error on few
    elements may be small by luck.
    """
    if output_gradients is None:
        shaped = reference_fn(*(x.detach() if isinstance(x, Tensor) else x for x in inputs))
        shaped = [shaped] if isinstance(shaped, Tensor) else shaped
        output_gradients = [normal(*y.shape).to(y.dtype if y.is_floating_point() else torch.float32) for y in shaped]
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    actual, plain, oracle = (
        outputs_and_gradients(function, given, output_gradients)
        for function, given in ((fused_fn, inputs), (reference_fn, inputs), (reference_fn, exact))
    )
    labels = [*(f"output {i}" for i in range(len(actual[0]))), *(f"gradient {i}" for i in range(len(actual[1])))]
    for i, name in enumerate(names):
        labels[len(actual[0]) + i] = f"gradient of {name}"
    rows = zip(labels, *(outputs + gradients for outputs, gradients in (actual, plain, oracle)), strict=True)
    for label, fused, torchs, right in rows:
        allowed = gradient_floor if gradient_floor is not None and label.startswith("gradient") else floor
        assert_error_at_most_twice(label, fused, torchs, right, allowed)


def assert_error_at_most_twice(
    label: str, fused: Tensor | None, plain: Tensor | None, right: Tensor | None, floor: float = 1e-7
) -> None:
    """Fail unless `fused` is at most twice as far from `right` (float64) as `plain`: see assert_as_good_as_plain."""
    if fused is None or plain is None or right is None:
        assert fused is None and plain is None and right is None, f"{label}: some of the three are None"
        return
    assert fused.dtype == plain.dtype, f"{label}: {fused.dtype}, plain torch {plain.dtype}"
    assert fused.shape == plain.shape, f"{label}: {tuple(fused.shape)}, plain torch {tuple(plain.shape)}"
    if fused.numel() == 0:
        return
    size = float(right.norm()) or 1.0
    error, allowed = (float((x.double() - right).norm()) / size for x in (fused, plain))
    u = torch.finfo(fused.dtype).eps / 2
    note = f"{tuple(fused.shape)} {fused.dtype}; MEGALM_TEST_SEED={RUN_SEED}"
    assert allowed < float("inf"), f"{label}: plain torch is not finite, choose other inputs; {note}"
    assert error <= 2 * allowed + floor + u * fused.numel() ** -0.5, (
        f"{label}: relative error {error:.3e}, plain torch {allowed:.3e}; {note}"
    )
